//! A cluster of real processes: jobs end in the bytes that they have alone, whatever happens to the processes.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::cluster::{Cluster, demo, engines_of, id, spec, trained};
use incipit_proto::v1::{self, BackboneState, JobReason, JobState, event::Resource};
use rustix::process::Signal;

#[test]
fn jobs_on_one_backbone_end_in_the_bytes_of_training_runs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 2), "local")?;
    cluster.wait_ready("b")?;
    for seed in 0..3 {
        cluster.submit(&format!("j{seed}"), "b", spec(seed, 45), &id())?;
    }
    for seed in 0..3 {
        let job = cluster.wait_end(&format!("j{seed}"))?;
        ensure!(job.state() == JobState::Succeeded, "{}: {}", job.name, job.message);
        ensure!(
            cluster.last_prompt(&format!("j{seed}"))? == trained(dir.path(), seed, 45, (1, 2))?,
            "seed {seed}"
        );
        let points = cluster.points(&format!("j{seed}"))?;
        let steps: Vec<u64> = points.iter().map(|point| point.step).collect();
        ensure!(steps == (1..=45).collect::<Vec<_>>(), "{steps:?}");
    }
    Ok(())
}

/// Scores of the evaluations in a run's `metrics.jsonl`.
fn scores(run: &Path) -> Result<Vec<f64>> {
    let lines = std::fs::read_to_string(run.join("metrics.jsonl"))?;
    let records = lines.lines().map(serde_json::from_str).collect::<Result<Vec<serde_json::Value>, _>>()?;
    let evaluations = records.iter().filter(|record| record["event"] == "eval");
    evaluations.map(|record| record["score"].as_f64().context("no score")).collect()
}

/// A training run with these flags in `dir`, and the same as a job called `name`.
fn run_and_hand_in(cluster: &Cluster, dir: &Path, name: &str, flags: &str) -> Result<()> {
    let (model, out) = (demo("model"), common::arg(dir.join(name)));
    let mut train = vec!["train", "-q", "--model", &model, "--out", &out, "--dtype", "f32", "--dp", "2"];
    train.extend(["--prompt-length", "4", "--batch-size", "2", "--max-input-length", "64"]);
    train.extend(flags.split(' '));
    common::incipit(&train)?.ok()?;
    let (endpoint, config) = (cluster.endpoint(), format!("{out}/run.toml"));
    let submit = ["job", "submit", "--coordinator", &endpoint, "--backbone", "b", "--name", name];
    common::incipit(&[&submit[..], &["--config", &config]].concat())?.ok()?;
    Ok(())
}

/// Whether a job has left and measured what its run has.
fn same_as_run(cluster: &Cluster, dir: &Path, name: &str, file: &str) -> Result<()> {
    let job = cluster.wait_end(name)?;
    ensure!(job.state() == JobState::Succeeded, "{name}: {}", job.message);
    let run = dir.join(name);
    let alone = std::fs::read(run.join("last").join(file))?;
    ensure!(cluster.last_file(name, file)? == alone, "{name}: another {file}");
    let score = |point: v1::MetricPoint| match point.point {
        Some(v1::metric_point::Point::Evaluation(evaluation)) => Some(evaluation.score),
        _ => None,
    };
    let measured: Vec<f64> = cluster.points(name)?.into_iter().filter_map(score).collect();
    ensure!(!measured.is_empty() && measured == scores(&run)?, "{name}: {measured:?}");
    Ok(())
}

#[test]
fn a_backbone_that_failed_is_retried_and_the_jobs_that_waited_for_it_are_trained() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    let model = dir.path().join("model");
    std::fs::create_dir(&model)?;
    cluster.create_backbone_of("b", &common::arg(&model), (1, 1), "local")?;
    cluster.submit("j", "b", spec(0, 4), &id())?;
    cluster.start_worker("w1")?;
    let failed = cluster.wait_for("the failure", |cluster| {
        Ok(Some(cluster.backbone("b")?).filter(|backbone| backbone.state() == BackboneState::Failed))
    })?;
    ensure!(failed.message.contains("has no weights"), "{}", failed.message);
    let hint = "incipit backbone retry b";
    cluster.wait_for("the hint", |cluster| Ok(cluster.job("j")?.message.contains(hint).then_some(())))?;
    for file in std::fs::read_dir(demo("model"))? {
        let file = file?;
        std::fs::copy(file.path(), model.join(file.file_name()))?;
    }
    let endpoint = cluster.endpoint();
    common::incipit(&["backbone", "retry", "b", "--wait", "--coordinator", &endpoint])?.ok()?;
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(cluster.last_prompt("j")? == trained(dir.path(), 0, 4, (1, 1))?);
    Ok(())
}

#[test]
fn a_job_is_continued_for_more_steps_on_another_mesh_and_from_further_back() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = with_backbone(dir.path())?;
    cluster.create_backbone("c", (1, 1), "local")?;
    cluster.submit("j", "b", spec(0, 20), &id())?;
    ensure!(cluster.wait_end("j")?.state() == JobState::Succeeded);
    let endpoint = cluster.endpoint();
    let go_on =
        |args: &[&str]| common::incipit(&[&["job", "continue", "--coordinator", &endpoint], args].concat());
    go_on(&["j", "--name", "more", "--steps", "45", "--backbone", "c"])?.ok()?;
    go_on(&["j", "--name", "none", "--checkpoint", "7"])?.refused(2, &["jobs/j/checkpoints/"])?;
    let whole = trained(dir.path(), 0, 45, (1, 1))?;
    let job = cluster.wait_end("more")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(job.continued_from == "jobs/j/checkpoints/00000020", "{}", job.continued_from);
    ensure!(cluster.last_prompt("more")? == whole, "more steps");
    let steps: Vec<u64> = cluster.points("more")?.iter().map(|point| point.step).collect();
    ensure!(steps == (21..=45).collect::<Vec<_>>(), "{steps:?}");
    go_on(&["more", "--name", "again", "--checkpoint", "40"])?.ok()?;
    let job = cluster.wait_end("again")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(cluster.last_prompt("again")? == whole, "from further back");
    Ok(())
}

fn with_backbone(dir: &Path) -> Result<Cluster> {
    let mut cluster = Cluster::start(dir)?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 2), "local")?;
    cluster.wait_ready("b")?;
    Ok(cluster)
}

#[test]
fn jobs_of_benchmarks_by_every_method_end_in_the_bytes_of_training_runs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = with_backbone(dir.path())?;
    let data = common::arg(common::root().join("crates/data/tests/goldens/tasks/data"));
    let (prompt, weights) = ("prompt.safetensors", "weights.safetensors");
    let few = "--steps 6 --eval-every 3 --checkpoint-every 3";
    let jobs = [
        ("after", prompt, format!("{few} --task boolq --prompt-placement after --predict rank")),
        ("decoder", prompt, format!("{few} --task multirc --prompt-placement decoder")),
        ("layers", prompt, format!("{few} --task record --prompt-layers all --parameter-scaling true")),
        ("sentinel", prompt, format!("{few} --task wsc --target-sentinel --max-target-length 24")),
        ("adapter", weights, format!("{few} --task multirc --method adapter --adapter-width 8")),
        ("model", weights, format!("{few} --task multirc --method model")),
        ("prefix", weights, format!("{few} --task multirc --method prefix --prefix-projection 8")),
        (
            "text",
            prompt,
            "--task multirc --method text --shots 2 --max-prompt-tokens 512 --eval-every 1".to_owned(),
        ),
        ("search", prompt, format!("{few} --task multirc --method search --candidates 4")),
    ];
    for (name, _, flags) in &jobs {
        run_and_hand_in(&cluster, dir.path(), name, &format!("--data-dir {data} {flags}"))?;
    }
    for (name, file, _) in &jobs {
        same_as_run(&cluster, dir.path(), name, file)?;
    }
    Ok(())
}

#[test]
fn a_job_that_trains_weights_is_paused_and_goes_on_to_the_same_bytes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = with_backbone(dir.path())?;
    let files = format!("--train {} --eval {}", demo("data/train.jsonl"), demo("data/eval.jsonl"));
    let flags = format!("{files} --method adapter --steps 150 --eval-every 75 --checkpoint-every 75");
    run_and_hand_in(&cluster, dir.path(), "slow", &flags)?;
    cluster.wait_for("the first steps", |cluster| Ok((cluster.points("slow")?.len() > 2).then_some(())))?;
    let job =
        |what: &str| common::incipit(&["job", what, "slow", "--coordinator", &cluster.endpoint()])?.ok();
    job("pause")?;
    let paused = cluster.wait_for("the pause", |cluster| {
        Ok(Some(cluster.job("slow")?).filter(|job| job.state() != JobState::Running))
    })?;
    ensure!(paused.state() == JobState::Paused, "{:?}: {}", paused.state(), paused.message);
    job("resume")?;
    same_as_run(&cluster, dir.path(), "slow", "weights.safetensors")
}

/// The evaluations of a job's tasks: name and score.
fn task_scores(points: Vec<v1::MetricPoint>) -> Vec<(String, f64)> {
    let tasks = points.into_iter().filter_map(|point| match point.point {
        Some(v1::metric_point::Point::Evaluation(evaluation)) => Some(evaluation.tasks),
        _ => None,
    });
    let score = |task: v1::TaskEvaluation| (task.name, task.evaluation.unwrap_or_default().score);
    tasks.flatten().map(score).collect()
}

#[test]
fn tasks_that_share_rows_are_one_job_and_end_in_the_bytes_of_a_run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = with_backbone(dir.path())?;
    let at = |name: &str| common::arg(dir.path().join(name));
    let data = common::arg(common::root().join("crates/data/tests/goldens/tasks/data"));
    let tasks = format!(
        "[boolq]\ntask = 'boolq'\ndata-dir = '{data}'\nbatch-size = 2\nprompt-length = 6\n\
         [mail]\ntrain = '{}'\nbatch-size = 4\nprompt-length = 6\n\
         [wsc]\ntask = 'wsc'\ndata-dir = '{data}'\nmax-target-length = 24\nbatch-size = 2\nprompt-length = 5\n",
        demo("data/train.jsonl")
    );
    std::fs::write(at("tasks.toml"), tasks)?;
    let (tasks, out, model, endpoint) = (at("tasks.toml"), at("both"), demo("model"), cluster.endpoint());
    let flags = "--shared-length 3 --max-input-length 64 --steps 90 --eval-every 30 \
                 --checkpoint-every 15";
    let flags = || ["--tasks", &tasks].into_iter().chain(flags.split_whitespace());
    let run = ["multitask", "-q", "--model", &model, "--out", &out, "--dtype", "f32", "--dp", "2"];
    common::incipit(&run.into_iter().chain(flags()).collect::<Vec<_>>())?.ok()?;
    let connected = |args: &[&str]| common::incipit(&[args, &["--coordinator", &endpoint]].concat())?.ok();
    let submit = ["job", "submit", "--backbone", "b", "--name", "both"];
    let plan = connected(&submit.into_iter().chain(flags()).chain(["--dry-run"]).collect::<Vec<_>>())?;
    ensure!(plan.stdout.contains("3, whose prompts share 3 rows"), "{}", plan.stdout);
    connected(&submit.into_iter().chain(flags()).collect::<Vec<_>>())?;

    // On its way it is put aside once.
    cluster.wait_for("the first steps", |cluster| Ok((cluster.points("both")?.len() > 2).then_some(())))?;
    connected(&["job", "pause", "both"])?;
    let has_left =
        |cluster: &Cluster| Ok(Some(cluster.job("both")?).filter(|job| job.state() != JobState::Running));
    let paused = cluster.wait_for("the pause", has_left)?;
    ensure!(paused.state() == JobState::Paused, "{:?}: {}", paused.state(), paused.message);
    connected(&["job", "resume", "both"])?;
    let job = cluster.wait_end("both")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);

    let scores = task_scores(cluster.points("both")?);
    for task in ["boolq", "mail", "wsc"] {
        let run = Path::new(&out).join(task);
        for file in ["prompt.safetensors", "optimizer.safetensors", "state.json"] {
            let alone = std::fs::read(run.join("last").join(file))?;
            ensure!(cluster.last_file("both", &format!("{task}/{file}"))? == alone, "another {task}/{file}");
        }
        let measured: Vec<f64> =
            scores.iter().filter(|(name, _)| name == task).map(|(_, score)| *score).collect();
        ensure!(measured == self::scores(&run)?, "{task}: {measured:?}");
        if measured.is_empty() {
            continue;
        }
        // Each that is evaluated has a best of its own, and a name.
        let (best, named) = (at(&format!("best-{task}")), at(&format!("named-{task}")));
        connected(&["checkpoint", "download", "both/best", "--task", task, "--out", &best])?;
        connected(&["prompt", "promote", "both/best", "--task", task, "--name", task])?;
        connected(&["prompt", "get", task, "--out", &named])?;
        let alone = std::fs::read(run.join("best/prompt.safetensors"))?;
        for dir in [best, named] {
            ensure!(std::fs::read(Path::new(&dir).join("prompt.safetensors"))? == alone, "{dir}");
        }
    }
    connected(&["checkpoint", "download", "both/last", "--out", &at("all")])?;
    let few = ["--data", &demo("data/eval.jsonl"), "--prompt", &at("all/mail")].map(str::to_owned);
    let few: Vec<&str> = few.iter().map(String::as_str).collect();
    common::incipit(&[&["eval", "--model", &model][..], &few].concat())?.ok()?;
    let of_all = common::incipit(&["checkpoint", "get", "both", "--coordinator", &endpoint])?;
    of_all.refused(2, &["boolq, mail, wsc; name one"])
}

#[test]
fn a_killed_engine_is_named_at_once_and_its_jobs_go_on_to_the_same_bytes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    let backbone = cluster.wait_ready("b")?;
    cluster.submit("j", "b", spec(1, 150), &id())?;
    cluster.wait_for("a checkpoint", |cluster| {
        Ok(cluster.job("j")?.progress.filter(|progress| progress.committed_step >= 20).map(drop))
    })?;
    let start = Instant::now();
    Cluster::signal(backbone.ranks[0].pid, Signal::KILL)?;
    let lost = cluster.wait_for("the loss", |cluster| {
        let found = cluster.backbone("b")?;
        Ok((found.epoch > backbone.epoch).then_some(found))
    })?;
    println!("noticed after {:?}: {}", start.elapsed(), lost.message);
    ensure!(start.elapsed() < Duration::from_secs(5));
    let events = cluster.events()?;
    let told = events.iter().find_map(|event| match &event.resource {
        Some(Resource::Backbone(told)) if told.state() == BackboneState::Degraded => {
            Some(told.message.clone())
        }
        _ => None,
    });
    let told = told.unwrap_or_default();
    ensure!(told.contains("rank 0") && told.contains("SIGKILL"), "the loss is told as {told:?}");
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(job.attempts.len() == 2 && job.attempts[0].reason() == JobReason::RankLost, "{:?}", job.attempts);
    ensure!(cluster.last_prompt("j")? == trained(dir.path(), 1, 150, (1, 1))?);
    Ok(())
}

#[test]
fn a_killed_coordinator_comes_back_to_training_that_never_stopped() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    cluster.wait_ready("b")?;
    let request = id();
    cluster.submit("j", "b", spec(2, 250), &request)?;
    cluster.wait_for("a step", |cluster| Ok(cluster.job("j")?.progress.filter(|p| p.step > 5).map(drop)))?;
    cluster.kill_coordinator()?;
    std::thread::sleep(Duration::from_millis(700));
    cluster.start_coordinator()?;
    // Sent again, a request makes no second job.
    cluster.submit("j", "b", spec(2, 250), &request)?;
    ensure!(cluster.jobs()?.len() == 1);
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(job.attempts.len() == 1, "{:?}", job.attempts);
    ensure!(cluster.last_prompt("j")? == trained(dir.path(), 2, 250, (1, 1))?);
    let revisions: Vec<u64> = cluster.events()?.iter().map(|event| event.revision).collect();
    ensure!(revisions == (1..=revisions.len() as u64).collect::<Vec<_>>(), "{revisions:?}");
    Ok(())
}

#[test]
fn a_killed_agent_leaves_no_engine_behind_and_another_machine_goes_on() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    cluster.wait_ready("b")?;
    cluster.submit("j", "b", spec(3, 150), &id())?;
    cluster.wait_for("a step", |cluster| Ok(cluster.job("j")?.progress.filter(|p| p.step > 5).map(drop)))?;
    cluster.start_worker("w2")?;
    let running = cluster.workers["w1"].id();
    ensure!(engines_of(running).len() == 1);
    let pid = cluster.kill_worker("w1")?;
    cluster.wait_for("its engine's end", |_| Ok(engines_of(pid).is_empty().then_some(())))?;
    let job = cluster.wait_end("j")?;
    ensure!(job.state() == JobState::Succeeded, "{}", job.message);
    ensure!(cluster.last_prompt("j")? == trained(dir.path(), 3, 150, (1, 1))?);
    Ok(())
}

#[test]
fn a_worker_that_is_asked_to_end_saves_its_jobs_first() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path())?;
    cluster.start_worker("w1")?;
    cluster.create_backbone("b", (1, 1), "local")?;
    cluster.wait_ready("b")?;
    let never_by_itself = v1::TrainingSpec { checkpoint_every: Some(1_000_000), ..spec(4, 1_000_000) };
    cluster.submit("j", "b", never_by_itself, &id())?;
    cluster.wait_for("a step", |cluster| Ok(cluster.job("j")?.progress.filter(|p| p.step > 5).map(drop)))?;
    let start = Instant::now();
    Cluster::signal(cluster.workers["w1"].id(), Signal::TERM)?;
    ensure!(cluster.workers.get_mut("w1").expect("it runs").wait()?.success());
    println!("ended after {:?}", start.elapsed());
    let job = cluster.wait_for("the job in the queue", |cluster| {
        let job = cluster.job("j")?;
        Ok((job.state() == JobState::Queued).then_some(job))
    })?;
    let saved = job.progress.unwrap_or_default().committed_step;
    ensure!(saved > 5, "saved at step {saved}");
    Ok(())
}
