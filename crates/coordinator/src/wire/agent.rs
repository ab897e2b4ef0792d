//! What agents say, checked, and what they are told.

use std::path::PathBuf;

use incipit_proto::{
    Problem,
    client::PROTOCOL,
    names::{BackboneName, JobName, WorkerName},
    v1::{
        self, attach_request::Message as Said, attach_response::Message as Told, engine_report, job_report,
    },
};

use super::{
    check::{MAX_TASKS, is_digest, is_file_name, is_task_name},
    show,
};
use crate::core::{
    Hello, ToAgent,
    checkpoint::{CheckpointFile, TaskScore},
    effects::{EngineAssignment, JobAssignment},
    input::{AgentMessage, EngineEvent, EngineStatus, JobEvent, LoadStatus, RendezvousKey, Report, Saved},
};

/// Ranks that a worker can hold, at most.
const MAX_SLOTS: u32 = 1024;
/// Files of a checkpoint, at most.
const MAX_FILES: usize = 512;

/// Who an agent is.
///
/// # Errors
/// If it speaks no protocol of ours, belongs to another cluster, or something is wrong with what it says.
pub fn hello(message: v1::Hello, cluster_id: &str) -> Result<Hello, Problem> {
    if !(message.protocol_min..=message.protocol_max).contains(&PROTOCOL) {
        let what = format!(
            "the agent speaks protocols {} to {}, and the coordinator {PROTOCOL}; install the same version",
            message.protocol_min, message.protocol_max
        );
        return Err(Problem::state("PROTOCOL", what));
    }
    if !message.cluster_id.is_empty() && message.cluster_id != cluster_id {
        let what = format!(
            "the agent belongs to the cluster {}, and this is {cluster_id}; start it again, and it belongs to this one",
            message.cluster_id
        );
        return Err(Problem::state("OTHER_CLUSTER", what).with("cluster_id", cluster_id));
    }
    // There is one role, and none stands for it: older programs of this protocol do not say theirs.
    if v1::WorkerRole::try_from(message.role).is_err() {
        let what = format!(
            "the agent wants the role {}, and this coordinator knows workers alone; start it with: incipit worker",
            message.role
        );
        return Err(Problem::state("ROLE", what).with("role", message.role));
    }
    if message.incarnation.is_empty() || message.incarnation.len() > 128 {
        return Err(Problem::field("hello.incarnation", "is missing or too long"));
    }
    if message.slots > MAX_SLOTS {
        return Err(Problem::field("hello.slots", format!("is {}; {MAX_SLOTS} are allowed", message.slots)));
    }
    let engines = message.engines.iter().map(|engine| engine_status("hello.engines", engine));
    Ok(Hello {
        worker: WorkerName::parse("hello.worker", &message.worker)?,
        incarnation: message.incarnation,
        version: message.version,
        protocol: PROTOCOL,
        machine: message.machine.unwrap_or_default(),
        slots: message.slots,
        engines: engines.collect::<Result<_, Problem>>()?,
    })
}

/// What an agent says after its hello.
///
/// # Errors
/// If it is a second hello, or something is wrong with it: then the stream ends.
pub fn agent_message(message: v1::AttachRequest) -> Result<AgentMessage, Problem> {
    let sequence = message.sequence;
    let report = |report| match sequence {
        0 => Err(Problem::field("sequence", "is 0, and this is a report; count from 1")),
        sequence => Ok(AgentMessage::Report { sequence, report }),
    };
    match message.message {
        None => Err(Problem::field("message", "is missing")),
        Some(Said::Hello(_)) => Err(Problem::field("hello", "comes a second time; it is the first message")),
        Some(Said::Heartbeat(message)) => heartbeat(&message),
        Some(Said::Engine(message)) => report(engine(message)?),
        Some(Said::Job(message)) => report(job(message)?),
        Some(Said::Logs(message)) => report(logs(message)?),
        Some(Said::RendezvousPut(put)) => {
            let key = rendezvous_key(&put.backbone, put.epoch, put.key)?;
            Ok(AgentMessage::RendezvousPut { key, value: put.value })
        }
        Some(Said::RendezvousGet(get)) => {
            let key = rendezvous_key(&get.backbone, get.epoch, get.key)?;
            Ok(AgentMessage::RendezvousGet { key, follows: get.follow })
        }
    }
}

fn engine_status(field: &str, engine: &v1::EngineStatus) -> Result<EngineStatus, Problem> {
    let backbone = BackboneName::parse(field, &engine.backbone)?;
    Ok(EngineStatus { backbone, epoch: engine.epoch, rank: engine.rank })
}

fn heartbeat(message: &v1::Heartbeat) -> Result<AgentMessage, Problem> {
    let known = message.engines.iter().filter(|engine| engine.total_bytes > 0);
    let status = |engine: &v1::EngineStatus| {
        let status = engine_status("heartbeat.engines", engine)?;
        let (loaded, total) = (engine.loaded_bytes.min(engine.total_bytes), engine.total_bytes);
        Ok(LoadStatus { engine: status, loaded, total })
    };
    let loading = known.take(MAX_SLOTS as usize).map(status).collect::<Result<_, Problem>>()?;
    Ok(AgentMessage::Heartbeat { draining: message.draining, loading })
}

fn rendezvous_key(backbone: &str, epoch: u64, key: String) -> Result<RendezvousKey, Problem> {
    if key.len() > 1024 {
        return Err(Problem::field("key", format!("has {} bytes; 1024 are allowed", key.len())));
    }
    Ok(RendezvousKey { backbone: BackboneName::parse("backbone", backbone)?, epoch, key })
}

fn engine(message: v1::EngineReport) -> Result<Report, Problem> {
    let event = match message.report {
        None => return Err(Problem::field("engine.report", "is missing")),
        Some(engine_report::Report::Ready(ready)) => EngineEvent::Ready {
            pid: ready.pid,
            fingerprint: ready.fingerprint,
            num_parameters: ready.num_parameters,
            d_model: ready.d_model,
            num_layers: ready.num_layers,
        },
        Some(engine_report::Report::Lost(lost)) => {
            EngineEvent::Lost { cause: lost.cause(), message: lost.message, alive: lost.alive }
        }
    };
    let backbone = BackboneName::parse("engine.backbone", &message.backbone)?;
    Ok(Report::Engine { backbone, epoch: message.epoch, rank: message.rank, event })
}

fn job(message: v1::JobReport) -> Result<Report, Problem> {
    let event = match message.report {
        None => return Err(Problem::field("job.report", "is missing")),
        Some(job_report::Report::Started(started)) => {
            JobEvent::Started { step: started.step, warnings: started.warnings }
        }
        Some(job_report::Report::Measured(measured)) => JobEvent::Measured(measured.points),
        Some(job_report::Report::Saved(saved)) => JobEvent::Saved(Saved {
            step: saved.step,
            score: finite(saved.score),
            best: saved.best,
            files: files(saved.files)?,
            tasks: tasks(saved.tasks)?,
        }),
        Some(job_report::Report::Left(left)) => JobEvent::Left {
            state: left.state(),
            reason: left.reason(),
            message: left.message,
            step: left.step,
        },
    };
    Ok(Report::Job {
        backbone: BackboneName::parse("job.backbone", &message.backbone)?,
        epoch: message.epoch,
        job: JobName::parse("job.job", &message.job)?,
        attempt: message.attempt,
        event,
    })
}

fn files(files: Vec<v1::CheckpointFile>) -> Result<Vec<CheckpointFile>, Problem> {
    let field = "job.saved.files";
    if files.is_empty() || files.len() > MAX_FILES {
        return Err(Problem::field(
            field,
            format!("has {} files; 1 to {MAX_FILES} are allowed", files.len()),
        ));
    }
    let file = |file: v1::CheckpointFile| {
        let plain = match file.name.split_once('/') {
            Some((task, name)) => is_task_name(task) && is_file_name(name),
            None => is_file_name(&file.name),
        };
        if !plain || !is_digest(&file.digest) {
            return Err(Problem::field(
                field,
                format!("has {:.80?} with the digest {:.80?}", file.name, file.digest),
            ));
        }
        Ok(CheckpointFile { name: file.name, digest: file.digest, size: file.size })
    };
    files.into_iter().map(file).collect()
}

fn tasks(tasks: Vec<v1::CheckpointTask>) -> Result<Vec<TaskScore>, Problem> {
    if tasks.len() > MAX_TASKS || !tasks.iter().all(|task| is_task_name(&task.name)) {
        let what = format!("has more than {MAX_TASKS} tasks, or one without a plain name");
        return Err(Problem::field("job.saved.tasks", what));
    }
    let task = |task: v1::CheckpointTask| {
        let score = finite(task.score);
        TaskScore { name: task.name, score, best: task.best }
    };
    Ok(tasks.into_iter().map(task).collect())
}

fn finite(score: Option<f64>) -> Option<f64> {
    score.filter(|score| score.is_finite())
}

fn logs(message: v1::LogReport) -> Result<Report, Problem> {
    let job = match message.job.as_str() {
        "" => None,
        text => Some(JobName::parse("logs.job", text)?),
    };
    let backbone = BackboneName::parse("logs.backbone", &message.backbone)?;
    Ok(Report::Logs { backbone, job, lines: message.lines })
}

/// What an agent is told, as a message; data of jobs lie under `data_roots`.
///
/// # Errors
/// Of [`ToAgent::Close`]: the problem that the stream is to end with.
pub fn to_agent(
    message: ToAgent,
    cluster_id: &str,
    data_roots: &[PathBuf],
) -> Result<v1::AttachResponse, Problem> {
    let told = match message {
        ToAgent::Close(problem) => return Err(problem),
        ToAgent::Welcome { protocol, heartbeat_interval_ms, lease_ms, acknowledged } => {
            let cluster_id = cluster_id.to_owned();
            Told::Welcome(v1::Welcome { cluster_id, protocol, heartbeat_interval_ms, lease_ms, acknowledged })
        }
        ToAgent::Acknowledged(sequence) => Told::Acknowledged(sequence),
        ToAgent::Engines(engines) => Told::Engines(v1::EngineAssignments {
            engines: engines.into_iter().map(engine_assignment).collect(),
        }),
        ToAgent::Jobs(jobs) => Told::Jobs(v1::JobAssignments {
            backbone: jobs.backbone.to_string(),
            epoch: jobs.epoch,
            jobs: jobs.jobs.into_iter().map(|job| job_assignment(job, data_roots)).collect(),
        }),
        ToAgent::Rendezvous { key, value } => Told::Rendezvous(v1::RendezvousValue {
            backbone: key.backbone.to_string(),
            epoch: key.epoch,
            key: key.key,
            value,
        }),
    };
    Ok(v1::AttachResponse { message: Some(told) })
}

fn engine_assignment(assignment: EngineAssignment) -> v1::EngineAssignment {
    let spec = assignment.spec;
    v1::EngineAssignment {
        backbone: assignment.backbone.to_string(),
        epoch: assignment.epoch,
        ranks: assignment.ranks,
        dtype: spec.dtype.to_string(),
        device: spec.device.to_string(),
        collective: spec.collective.to_string(),
        model: spec.model,
        tp: spec.tp,
        dp: spec.dp,
        microbatch_tokens: spec.microbatch_tokens,
    }
}

fn job_assignment(assignment: JobAssignment, data_roots: &[PathBuf]) -> v1::JobAssignment {
    v1::JobAssignment {
        job: assignment.job.to_string(),
        attempt: assignment.attempt.number,
        spec: Some(assignment.spec),
        priority: assignment.priority,
        checkpoint: assignment.checkpoint.map(|checkpoint| show::checkpoint(&checkpoint)),
        wish: assignment.wish.into(),
        start_time: Some(show::timestamp(assignment.attempt.start_time)),
        data_roots: data_roots.iter().map(|root| root.to_string_lossy().into_owned()).collect(),
    }
}
