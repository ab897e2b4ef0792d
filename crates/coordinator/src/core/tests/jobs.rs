//! Stories of jobs.

use incipit_proto::names::PromptName;
use incipit_proto::v1::{
    EngineLossCause, JobReason, JobState, JobWish, Schedule, TrainingSpec, TrainingTask,
};
use tonic::Code;

use super::world::{
    World, backbone_name, files, job_name, left, new_job, saved, target, training, worker_name,
};
use crate::core::{
    Reply, Request,
    backbone::{BackboneSpec, Collective, Dtype},
    checkpoint::{CheckpointFile, TaskScore},
    input::{CheckpointRef, EngineEvent, JobEvent, NewJob, Report, Saved, StepRef},
    job::KEPT_ATTEMPTS,
    read::JobFilter,
};

#[test]
fn a_job_runs_at_once_where_there_is_room_and_waits_where_there_is_none() {
    let mut world = World::ready();
    for id in ["a", "b", "c"] {
        world.create_job(id, "b");
    }
    assert_eq!(world.state("a"), (JobState::Running, JobReason::Started));
    assert_eq!(world.state("b"), (JobState::Running, JobReason::Started));
    assert_eq!(world.state("c"), (JobState::Queued, JobReason::WaitingForPlace));
    world.job_event("w", "a", left(JobState::Succeeded, JobReason::StepsDone));
    assert_eq!(world.state("a"), (JobState::Succeeded, JobReason::StepsDone));
    assert_eq!(world.state("c"), (JobState::Running, JobReason::Started));
}

#[test]
fn a_job_on_a_backbone_that_is_not_ready_says_so_and_starts_when_it_is() {
    let mut world = World::new();
    world.connect("w", 1, true);
    world.create_backbone("b", super::world::spec(Collective::Local, 1, 1, 2));
    world.create_job("j", "b");
    assert_eq!(world.state("j"), (JobState::Queued, JobReason::BackboneNotReady));
    world.load("w");
    assert_eq!(world.state("j"), (JobState::Running, JobReason::Started));
}

#[test]
fn a_higher_priority_jumps_ahead_by_minutes_and_nobody_starves() {
    let mut world = World::ready();
    world.create_job("a", "b");
    world.create_job("b", "b");
    world.create_job("low", "b");
    world.wait_with(30_000, &["w"]);
    let mut high = new_job("high", "b");
    high.priority = 11;
    world.ask(Request::CreateJob { job: Box::new(high.clone()), validate_only: false }).unwrap();
    let position = |world: &World, id: &str| world.core.job_view(&job_name(id)).unwrap().queue_position;
    assert_eq!((position(&world, "high"), position(&world, "low")), (0, 1));
    world.wait_with(60_000, &["w"]);
    high.name = job_name("later");
    world.ask(Request::CreateJob { job: Box::new(high), validate_only: false }).unwrap();
    assert_eq!((position(&world, "high"), position(&world, "low"), position(&world, "later")), (0, 1, 2));
    let page = world.core.list_jobs(&JobFilter::default(), 2, "").unwrap();
    let listed: Vec<_> = page.items.iter().map(|view| (view.job.name.id(), view.queue_position)).collect();
    assert_eq!(listed, [("later", 2), ("high", 0)]);
}

#[test]
fn a_pause_is_a_wish_until_the_engine_has_left() {
    let mut world = World::running();
    world.ask(Request::PauseJob(target("j"))).unwrap();
    assert_eq!((world.state("j").0, world.wish("j")), (JobState::Running, JobWish::Pause));
    let told = &world.agents.values().next().unwrap().jobs;
    assert_eq!(told.values().next().unwrap().jobs[0].wish, JobWish::Pause);
    world.job_event("w", "j", saved(5));
    world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
    assert_eq!(
        (world.state("j"), world.wish("j")),
        ((JobState::Paused, JobReason::Requested), JobWish::Unspecified)
    );
    world.ask(Request::ResumeJob(target("j"))).unwrap();
    assert_eq!(world.state("j").0, JobState::Running);
    let attempt = world.job("j").open_attempt().unwrap();
    assert_eq!((attempt.number, attempt.start_step), (2, 5));
}

#[test]
fn a_pause_that_is_taken_back_too_late_leads_to_the_queue_and_not_to_a_pause() {
    let mut world = World::running();
    world.ask(Request::PauseJob(target("j"))).unwrap();
    world.ask(Request::ResumeJob(target("j"))).unwrap();
    assert_eq!(world.wish("j"), JobWish::Unspecified);
    world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
    assert_eq!(world.state("j").0, JobState::Running);
    assert_eq!(world.job("j").last_attempt(), 2);
}

#[test]
fn a_wish_is_granted_when_the_rank_is_lost_before_the_engine_has_left() {
    for (request, state) in [
        (Request::PauseJob(target("j")), JobState::Paused),
        (Request::CancelJob(target("j")), JobState::Cancelled),
    ] {
        let mut world = World::running();
        world.ask(request).unwrap();
        world.engine_lost("w", "b", 0, EngineLossCause::Exited);
        assert_eq!(world.state("j"), (state, JobReason::Requested));
        let end = world.job("j").attempts[0].end.clone().unwrap();
        assert_eq!(end.reason, JobReason::RankLost);
    }
}

#[test]
fn a_job_that_was_done_before_its_cancellation_arrived_has_succeeded() {
    let mut world = World::running();
    world.ask(Request::CancelJob(target("j"))).unwrap();
    let late = world.job_report("j", left(JobState::Succeeded, JobReason::StepsDone));
    world.report("w", late.clone());
    assert_eq!(world.state("j"), (JobState::Succeeded, JobReason::StepsDone));
    // And one that is cancelled stays so, whatever comes behind.
    let mut world = World::running();
    world.ask(Request::CancelJob(target("j"))).unwrap();
    world.job_event("w", "j", left(JobState::Cancelled, JobReason::Requested));
    world.report("w", late);
    assert_eq!(world.state("j"), (JobState::Cancelled, JobReason::Requested));
}

#[test]
fn a_failure_is_tried_again_as_often_as_the_policy_says_and_no_other_is() {
    let mut world = World::running();
    world.job_event("w", "j", left(JobState::Failed, JobReason::OutOfMemory));
    // Queued with RETRYING, and started again at once, as there is room.
    assert_eq!((world.state("j").0, world.job("j").last_attempt()), (JobState::Running, 2));
    world.job_event("w", "j", left(JobState::Failed, JobReason::OutOfMemory));
    assert_eq!(world.state("j"), (JobState::Failed, JobReason::OutOfMemory));
    let mut world = World::running();
    world.job_event("w", "j", left(JobState::Failed, JobReason::NonFinite));
    assert_eq!(world.state("j"), (JobState::Failed, JobReason::NonFinite));
}

#[test]
fn a_failure_that_would_be_tried_again_grants_a_wish_instead() {
    let mut world = World::running();
    world.ask(Request::CancelJob(target("j"))).unwrap();
    world.job_event("w", "j", left(JobState::Failed, JobReason::OutOfMemory));
    assert_eq!(world.state("j"), (JobState::Cancelled, JobReason::Requested));
}

#[test]
fn what_does_not_fit_the_state_is_refused_and_what_is_so_already_is_not() {
    let mut world = World::running();
    world.job_event("w", "j", left(JobState::Succeeded, JobReason::StepsDone));
    let requests: [fn(_) -> Request; 3] = [Request::PauseJob, Request::ResumeJob, Request::CancelJob];
    for request in requests {
        let problem = world.ask(request(target("j"))).unwrap_err();
        assert_eq!((problem.code, &*problem.reason), (Code::FailedPrecondition, "JOB_STATE"));
    }
    let mut world = World::ready();
    for (id, request) in [("p", Request::PauseJob(target("p"))), ("c", Request::CancelJob(target("c")))] {
        world.create_job("x", "b");
        world.create_job("y", "b");
        world.create_job(id, "b");
        world.ask(request.clone()).unwrap();
        let revision = world.core.revision();
        world.ask(request).unwrap();
        assert_eq!(world.core.revision(), revision);
        for other in ["x", "y"] {
            world.job_event("w", other, left(JobState::Succeeded, JobReason::StepsDone));
            world.ask(Request::DeleteJob(target(other))).unwrap();
        }
    }
    world.create_job("r", "b");
    world.ask(Request::CancelJob(target("r"))).unwrap();
    let problem = world.ask(Request::ResumeJob(target("r"))).unwrap_err();
    assert!(problem.message.contains("being cancelled"), "{problem}");
}

#[test]
fn an_etag_of_another_state_is_refused() {
    let mut world = World::running();
    let etag = world.job("j").revision;
    let mut stale = target("j");
    stale.etag = Some(etag - 1);
    assert_eq!(world.ask(Request::PauseJob(stale)).unwrap_err().code, Code::Aborted);
    let mut current = target("j");
    current.etag = Some(etag);
    world.ask(Request::PauseJob(current)).unwrap();
}

#[test]
fn a_deleted_job_takes_all_with_it_and_late_reports_do_not_reach_one_of_its_name() {
    let mut world = World::running();
    world.job_event("w", "j", JobEvent::Measured(vec![training(1)]));
    world.job_event("w", "j", saved(1));
    assert_eq!(world.ask(Request::DeleteJob(target("j"))).unwrap_err().reason, "JOB_STATE");
    let late = world.job_report("j", saved(9));
    world.job_event("w", "j", left(JobState::Succeeded, JobReason::StepsDone));
    world.ask(Request::DeleteJob(target("j"))).unwrap();
    let rows = world.core.rows();
    assert!(rows.jobs.is_empty() && rows.checkpoints.is_empty() && rows.metrics.is_empty());
    world.create_job("j", "b");
    assert_eq!(world.job("j").open_attempt().unwrap().number, 2);
    world.report("w", late);
    assert_eq!(world.job("j").committed_step, 0);
}

#[test]
fn a_promoted_checkpoint_keeps_its_job() {
    let mut world = World::running();
    world.job_event("w", "j", saved(1));
    world.job_event("w", "j", left(JobState::Succeeded, JobReason::StepsDone));
    let prompt = incipit_proto::names::PromptName::of_id("id", "p").unwrap();
    let checkpoint = CheckpointRef { job: job_name("j"), step: StepRef::Last, task: None };
    let promote = Request::PromotePrompt {
        prompt: prompt.clone(),
        checkpoint,
        etag: None,
        description: "good".to_owned(),
    };
    let Reply::Prompt(first) = world.ask(promote.clone()).unwrap() else { panic!() };
    let Reply::Prompt(second) = world.ask(promote.clone()).unwrap() else { panic!() };
    assert_eq!((first.version, second.version, second.previous), (1, 2, Some(1)));
    assert_eq!(world.ask(Request::DeleteJob(target("j"))).unwrap_err().reason, "CHECKPOINT_PROMOTED");
    for version in [1, 2] {
        world.ask(Request::DeletePromptVersion { prompt: prompt.clone(), version, etag: None }).unwrap();
    }
    // The number of a version that is gone is not given again.
    let Reply::Prompt(third) = world.ask(promote).unwrap() else { panic!() };
    assert_eq!((third.version, third.previous), (3, None));
    world.ask(Request::DeletePromptVersion { prompt, version: 3, etag: None }).unwrap();
    world.ask(Request::DeleteJob(target("j"))).unwrap();
}

#[test]
fn the_newest_the_best_the_pinned_and_the_one_gone_on_from_are_kept() {
    let mut world = World::running();
    let best = |step| Saved { step, files: files(step), score: Some(0.9), best: true, ..Saved::default() };
    world.job_event("w", "j", JobEvent::Saved(best(1)));
    for step in 2..=4 {
        world.job_event("w", "j", saved(step));
    }
    let pinned = CheckpointRef { job: job_name("j"), step: StepRef::At(2), task: None };
    world.ask(Request::PinCheckpoint { checkpoint: pinned, etag: None, pinned: true }).unwrap();
    world.ask(Request::PauseJob(target("j"))).unwrap();
    world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
    world.ask(Request::ResumeJob(target("j"))).unwrap();
    for step in 5..=9 {
        world.job_event("w", "j", saved(step));
    }
    let steps = |world: &World| {
        world.core.checkpoints_of(&job_name("j")).map(|checkpoint| checkpoint.step).collect::<Vec<_>>()
    };
    assert_eq!(steps(&world), [9, 8, 7, 4, 2, 1]);
    world.job_event("w", "j", left(JobState::Succeeded, JobReason::StepsDone));
    assert_eq!(steps(&world), [9, 8, 7, 2, 1]);
    let delete = |step| {
        let checkpoint = CheckpointRef { job: job_name("j"), step: StepRef::At(step), task: None };
        Request::DeleteCheckpoint { checkpoint, etag: None }
    };
    assert_eq!(world.ask(delete(2)).unwrap_err().reason, "CHECKPOINT_PINNED");
    world.ask(delete(1)).unwrap();
    assert_eq!(world.job("j").best, None);
    world.ask(delete(9)).unwrap();
    assert_eq!(world.job("j").committed_step, 9);
}

#[test]
fn a_job_whose_checkpoint_is_damaged_goes_on_from_the_one_before_and_fails_where_there_is_none() {
    let mut world = World::running();
    for step in 1..=3 {
        world.job_event("w", "j", saved(step));
    }
    world.ask(Request::PauseJob(target("j"))).unwrap();
    world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
    world.ask(Request::ResumeJob(target("j"))).unwrap();
    let damaged = || left(JobState::Failed, JobReason::CheckpointDamaged);
    world.job_event("w", "j", damaged());
    let job = world.job("j");
    assert_eq!((job.state, job.committed_step, job.num_failures), (JobState::Running, 2, 0));
    let ended = job.attempts[1].end.as_ref().expect("it went back");
    assert_eq!(ended.reason, JobReason::CheckpointDamaged);
    assert!(ended.message.contains("it goes on from step 2"), "{}", ended.message);
    let sent = &world.agents[&worker_name("w")].jobs[&backbone_name("b")].jobs[0];
    assert_eq!(sent.checkpoint.as_ref().map(|checkpoint| checkpoint.step), Some(2));

    // Nothing is made of it, and the last one is another.
    let of = |step| CheckpointRef { job: job_name("j"), step, task: None };
    let prompt = PromptName::of_id("id", "p").unwrap();
    let promote = Request::PromotePrompt {
        prompt,
        checkpoint: of(StepRef::At(3)),
        etag: None,
        description: String::new(),
    };
    assert_eq!(world.ask(promote).unwrap_err().reason, "CHECKPOINT_DAMAGED");
    let start = Some(of(StepRef::At(3)));
    let job = Box::new(NewJob { start, ..new_job("k", "b") });
    let go_on = Request::CreateJob { job, validate_only: false };
    assert_eq!(world.ask(go_on).unwrap_err().reason, "CHECKPOINT_DAMAGED");
    assert_eq!(world.core.find_checkpoint(&of(StepRef::Last)).unwrap().step, 2);

    // It is whole again once its job has come there again.
    world.job_event("w", "j", saved(3));
    assert!(!world.core.checkpoint(&job_name("j"), 3).unwrap().damaged);
    assert_eq!(world.job("j").committed_step, 3);

    // What was passed is gone; and one after the other may be damaged.
    for step in [2, 1] {
        world.ask(Request::PauseJob(target("j"))).unwrap();
        world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
        world.ask(Request::ResumeJob(target("j"))).unwrap();
        world.job_event("w", "j", damaged());
        assert_eq!(world.job("j").committed_step, step);
    }
    world.job_event("w", "j", saved(4));
    let steps: Vec<u64> = world.core.checkpoints_of(&job_name("j")).map(|of| of.step).collect();
    assert_eq!(steps, [4, 1]);
    for _ in [4, 1] {
        world.ask(Request::PauseJob(target("j"))).unwrap();
        world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
        world.ask(Request::ResumeJob(target("j"))).unwrap();
        world.job_event("w", "j", damaged());
    }
    let job = world.job("j");
    assert_eq!((job.state, job.reason), (JobState::Failed, JobReason::CheckpointDamaged));
    assert!(job.message.contains("no checkpoint before that"), "{}", job.message);
}

#[test]
fn a_job_goes_on_from_a_checkpoint_of_another_with_what_that_knew_of_its_best() {
    let mut world = World::running();
    let best = Saved { step: 1, files: files(1), score: Some(0.9), best: true, ..Saved::default() };
    world.job_event("w", "j", JobEvent::Saved(best));
    world.job_event("w", "j", saved(2));
    world.job_event("w", "j", saved(3));
    world.job_event("w", "j", left(JobState::Failed, JobReason::Internal));
    let go_on = |id: &str, step| {
        let start = Some(CheckpointRef { job: job_name("j"), step, task: None });
        Request::CreateJob { job: Box::new(NewJob { start, ..new_job(id, "b") }), validate_only: false }
    };
    world.ask(go_on("k", StepRef::Last)).unwrap();
    world.ask(go_on("l", StepRef::At(2))).unwrap();
    assert_eq!(world.ask(go_on("m", StepRef::At(7))).unwrap_err().code, Code::NotFound);
    let Request::CreateJob { mut job, .. } = go_on("m", StepRef::Last) else { unreachable!() };
    job.spec.steps = Some(2);
    let problem = world.ask(Request::CreateJob { job, validate_only: false }).unwrap_err();
    assert!(problem.message.contains("job.spec.steps"), "{}", problem.message);
    world.ask(Request::DeleteJob(target("j"))).unwrap();
    for (id, step) in [("k", 3), ("l", 2)] {
        let steps: Vec<u64> = world.core.checkpoints_of(&job_name(id)).map(|of| of.step).collect();
        assert_eq!(steps, [step, 1]);
        let job = world.job(id);
        assert_eq!((job.committed_step, job.best.map(|best| best.step)), (step, Some(1)));
        assert_eq!(job.continued_from, format!("jobs/j/checkpoints/{step:08}"));
        let sent = &world.agents[&worker_name("w")].jobs[&backbone_name("b")].jobs;
        let sent = sent.iter().find(|sent| sent.job == job_name(id));
        let checkpoint = sent.and_then(|sent| sent.checkpoint.as_ref()).expect("it is told");
        assert_eq!((checkpoint.step, checkpoint.files.len()), (step, files(step).len()));
    }
    world.job_event("w", "k", saved(4));
    assert_eq!(world.job("k").committed_step, 4);
}

#[test]
fn a_job_does_not_go_on_with_another_model_another_type_or_another_end_of_a_falling_schedule() {
    let mut world = World::running();
    world.job_event("w", "j", saved(3));
    let schedule = Schedule::Linear.into();
    let falling = TrainingSpec { schedule, steps: Some(8), ..Default::default() };
    let falling = NewJob { spec: falling, ..new_job("falling", "b") };
    world.ask(Request::CreateJob { job: Box::new(falling.clone()), validate_only: false }).unwrap();
    world.job_event("w", "falling", saved(3));
    let one = super::world::spec(Collective::Local, 1, 1, 2);
    world.create_backbone("narrow", BackboneSpec { dtype: Dtype::Bf16, ..one.clone() });
    world.create_backbone("other", one);
    let (pid, num_parameters, d_model, num_layers) = (7, 60, 4, 2);
    let fingerprint = "g".to_owned();
    let event = EngineEvent::Ready { pid, fingerprint, num_parameters, d_model, num_layers };
    world.report("w", Report::Engine { backbone: backbone_name("other"), epoch: 1, rank: 0, event });
    let mut go_on = |from: &str, backbone: &str, spec: TrainingSpec| {
        let start = Some(CheckpointRef { job: job_name(from), step: StepRef::Last, task: None });
        let job = Box::new(NewJob { start, spec, ..new_job("k", backbone) });
        world.ask(Request::CreateJob { job, validate_only: true }).map_err(|problem| problem.message)
    };
    assert!(go_on("j", "other", TrainingSpec::default()).unwrap_err().contains("fingerprint is g, not f"));
    assert!(go_on("j", "narrow", TrainingSpec::default()).unwrap_err().contains("in bf16"));
    let longer = TrainingSpec { steps: Some(9), ..falling.spec.clone() };
    assert!(go_on("falling", "b", longer).unwrap_err().contains("schedule"));
    assert!(go_on("falling", "b", falling.spec).is_ok());
    assert!(go_on("j", "b", TrainingSpec { steps: Some(9), ..Default::default() }).is_ok());
}

#[test]
fn each_of_several_tasks_keeps_its_best_checkpoint_and_is_promoted_by_its_name() {
    let mut world = World::ready();
    let mut several = new_job("j", "b");
    several.spec.tasks = ["x", "y"].map(|name| TrainingTask { name: name.to_owned(), spec: None }).into();
    world.ask(Request::CreateJob { job: Box::new(several.clone()), validate_only: false }).unwrap();
    let start = Some(CheckpointRef { job: job_name("j"), step: StepRef::Best, task: None });
    let of_none = Box::new(NewJob { start, name: job_name("k"), ..several });
    let problem = world.ask(Request::CreateJob { job: of_none, validate_only: false }).unwrap_err();
    assert!(problem.message.contains("continue_from"), "{}", problem.message);
    let of = |task: &str, step: u64| {
        let digest = blake3::hash(format!("{task} {step}").as_bytes()).to_hex().to_string();
        CheckpointFile { name: format!("{task}/prompt.safetensors"), digest, size: 1 }
    };
    let mut save = |step: u64, best: [bool; 2]| {
        let score = |name: &str, best| TaskScore { name: name.to_owned(), score: Some(step as f64), best };
        let tasks = vec![score("x", best[0]), score("y", best[1])];
        let files = vec![of("x", step), of("y", step)];
        world.job_event("w", "j", JobEvent::Saved(Saved { step, files, tasks, ..Saved::default() }));
    };
    save(1, [true, true]);
    save(2, [false, true]);
    (3..=9).for_each(|step| save(step, [false, false]));
    let job = job_name("j");
    let steps: Vec<u64> = world.core.checkpoints_of(&job).map(|checkpoint| checkpoint.step).collect();
    assert_eq!(steps, [9, 8, 7, 2, 1]);

    let best = |task: Option<&str>| CheckpointRef {
        job: job_name("j"),
        step: StepRef::Best,
        task: task.map(str::to_owned),
    };
    let prompt = incipit_proto::names::PromptName::of_id("id", "p").unwrap();
    let promote = |task: Option<&str>| {
        let (prompt, checkpoint) = (prompt.clone(), best(task));
        Request::PromotePrompt { prompt, checkpoint, etag: None, description: String::new() }
    };
    for (task, step) in [("x", 1), ("y", 2)] {
        assert_eq!(world.core.find_checkpoint(&best(Some(task))).unwrap().step, step, "{task}");
        let Reply::Prompt(version) = world.ask(promote(Some(task))).unwrap() else { panic!() };
        assert_eq!((&version.digest, version.score), (&of(task, step).digest, Some(step as f64)));
        assert_eq!(version.task.as_deref(), Some(task));
    }
    for (task, words) in [(None, "x, y; name one"), (Some("z"), "has x, y")] {
        let problem = world.ask(promote(task)).unwrap_err();
        assert!(problem.fields[0].0 == "task" && problem.message.contains(words), "{problem}");
    }
    let last = CheckpointRef { step: StepRef::Last, ..best(None) };
    assert_eq!(world.core.find_checkpoint(&last).unwrap().step, 9, "all tasks have it");
}

#[test]
fn a_job_of_one_task_has_none_to_be_named() {
    let mut world = World::running();
    world.job_event("w", "j", saved(1));
    let named = CheckpointRef { job: job_name("j"), step: StepRef::Last, task: Some("x".to_owned()) };
    let problem = world.core.find_checkpoint(&named).unwrap_err();
    assert!(problem.fields[0].0 == "task" && problem.message.contains("leave it out"), "{problem}");
}

#[test]
fn the_last_checkpoint_of_a_job_that_goes_on_is_not_deleted() {
    let mut world = World::running();
    world.job_event("w", "j", saved(1));
    let last = CheckpointRef { job: job_name("j"), step: StepRef::At(1), task: None };
    assert_eq!(
        world.ask(Request::DeleteCheckpoint { checkpoint: last, etag: None }).unwrap_err().reason,
        "CHECKPOINT_NEEDED"
    );
}

#[test]
fn a_job_remembers_its_last_attempts_alone() {
    let mut world = World::running();
    for _ in 0..30 {
        world.ask(Request::PauseJob(target("j"))).unwrap();
        world.job_event("w", "j", left(JobState::Paused, JobReason::Requested));
        world.ask(Request::ResumeJob(target("j"))).unwrap();
    }
    assert_eq!((world.job("j").attempts.len(), world.job("j").last_attempt()), (KEPT_ATTEMPTS, 31));
}
