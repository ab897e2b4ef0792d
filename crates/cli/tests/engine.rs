//! An engine, driven by its frames as an agent drives it, on the demo model.

mod common;

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use common::{command, demo, incipit};
use incipit_proto::v1::{self, JobReason, JobState, JobWish, job_report::Report};
use incipit_worker::frames::{self, FromEngine, Jobs, Join, LocalJob, LocalTask, Notice, Order, ToEngine};

/// An engine's process, killed with the test.
struct Engine {
    child: Child,
    orders: ChildStdin,
    notices: BufReader<ChildStdout>,
    _dir: tempfile::TempDir,
    outbox: PathBuf,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }
}

impl Engine {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut child = command(&["engine", "--parent", &std::process::id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the engine starts");
        let orders = child.stdin.take().expect("a pipe");
        let notices = BufReader::new(child.stdout.take().expect("a pipe"));
        let outbox = dir.path().to_owned();
        Self { child, orders, notices, _dir: dir, outbox }
    }

    fn tell(&mut self, order: Order) {
        frames::write(&mut self.orders, &ToEngine { order: Some(order) }).expect("the engine hears");
    }

    fn join(&mut self, epoch: u64, (tp, dp): (u32, u32)) {
        let assignment = v1::EngineAssignment {
            backbone: "backbones/demo".to_owned(),
            epoch,
            ranks: (0..tp * dp).collect(),
            model: demo("model"),
            dtype: "f32".to_owned(),
            device: "cpu".to_owned(),
            tp,
            dp,
            collective: "local".to_owned(),
            microbatch_tokens: 0,
        };
        let outbox = self.outbox.to_string_lossy().into_owned();
        self.tell(Order::Join(Join {
            assignment: Some(assignment),
            outbox,
            neighbours: 1,
            ..Join::default()
        }));
        let ready = self.hear(|notice| matches!(notice, Notice::Ready(ready) if ready.epoch == epoch));
        let Notice::Ready(ready) = ready else { unreachable!() };
        assert_eq!(ready.engine.expect("an engine").pid, self.child.id());
    }

    /// The next notice of this kind; what comes before is let go.
    fn hear(&mut self, wanted: impl Fn(&Notice) -> bool) -> Notice {
        let start = Instant::now();
        loop {
            let frame: FromEngine =
                frames::read(&mut self.notices).expect("a frame").expect("the engine lives");
            let notice = frame.notice.expect("a notice");
            if let Notice::Failed(failed) = &notice {
                panic!("{failed:?}");
            }
            if wanted(&notice) {
                return notice;
            }
            assert!(start.elapsed() < Duration::from_secs(120), "nothing came");
        }
    }

    fn report(&mut self, wanted: impl Fn(&v1::JobReport) -> bool) -> v1::JobReport {
        let report = self.hear(|notice| matches!(notice, Notice::Job(report) if wanted(report)));
        let Notice::Job(report) = report else { unreachable!() };
        report
    }
}

fn spec(seed: u64, steps: u64) -> v1::TrainingSpec {
    v1::TrainingSpec {
        prompt_length: Some(8),
        batch_size: Some(8),
        steps: Some(steps),
        eval_every: Some(10),
        checkpoint_every: Some(10),
        seed: Some(seed),
        ..v1::TrainingSpec::default()
    }
}

fn job(name: &str, attempt: u32, spec: v1::TrainingSpec) -> LocalJob {
    let job = format!("jobs/{name}");
    let assignment =
        v1::JobAssignment { job, attempt, spec: Some(spec), priority: 10, ..v1::JobAssignment::default() };
    LocalJob { assignment: Some(assignment), tasks: vec![files("")], ..LocalJob::default() }
}

/// The demo's files, and a prompt to start as, if there is one.
fn files(initial: &str) -> LocalTask {
    LocalTask { train: demo("data/train.jsonl"), eval: demo("data/eval.jsonl"), initial: initial.to_owned() }
}

fn wish(mut job: LocalJob, wish: JobWish) -> LocalJob {
    job.assignment.as_mut().expect("an assignment").set_wish(wish);
    job
}

/// What `incipit train` makes of the same.
fn trained(dir: &Path, seed: u64, steps: u64) -> Vec<u8> {
    trained_from(dir, seed, steps, &[])
}

/// The same, with more flags.
fn trained_from(dir: &Path, seed: u64, steps: u64, more: &[&str]) -> Vec<u8> {
    let out = dir.join(format!("alone-{seed}")).display().to_string();
    let (seed, steps) = (seed.to_string(), steps.to_string());
    let (model, train, eval) = (demo("model"), demo("data/train.jsonl"), demo("data/eval.jsonl"));
    let args = [
        "train",
        "--model",
        &model,
        "--train",
        &train,
        "--eval",
        &eval,
        "--out",
        &out,
        "--dtype",
        "f32",
        "--prompt-length",
        "8",
        "--batch-size",
        "8",
        "--steps",
        &steps,
        "--eval-every",
        "10",
        "--checkpoint-every",
        "10",
        "--seed",
        &seed,
        "-q",
    ];
    incipit(&[&args[..], more].concat()).ok();
    std::fs::read(Path::new(&out).join("last/prompt.safetensors")).expect("a prompt")
}

/// The prompts of the last checkpoints that were saved, until all jobs have left.
fn until_all_left(engine: &mut Engine, jobs: usize) -> BTreeMap<String, (v1::JobLeft, Vec<u8>)> {
    let (mut prompts, mut left) = (BTreeMap::new(), BTreeMap::new());
    while left.len() < jobs {
        match engine.hear(|notice| matches!(notice, Notice::Saved(_) | Notice::Job(_))) {
            Notice::Saved(saved) => {
                let report = saved.report.expect("a report");
                let prompt =
                    std::fs::read(Path::new(&saved.dir).join("prompt.safetensors")).expect("a prompt");
                prompts.insert(report.job, prompt);
            }
            Notice::Job(v1::JobReport { job, report: Some(Report::Left(end)), .. }) => {
                let prompt = prompts.get(&job).cloned().unwrap_or_default();
                left.insert(job, (end, prompt));
            }
            _ => {}
        }
    }
    left
}

#[test]
fn jobs_of_one_batch_end_in_the_bytes_that_each_has_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut engine = Engine::start();
    engine.join(1, (1, 1));
    let jobs = (0..3).map(|seed| job(&format!("j{seed}"), 1, spec(seed, 25))).collect();
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs }));
    let left = until_all_left(&mut engine, 3);
    for seed in 0..3 {
        let (end, prompt) = &left[&format!("jobs/j{seed}")];
        assert_eq!((end.state(), end.step), (JobState::Succeeded, 25), "{end:?}");
        assert!(*prompt == trained(dir.path(), seed, 25), "the prompt of seed {seed} differs");
    }
}

#[test]
fn a_job_that_starts_as_another_prompt_ends_in_the_bytes_that_train_leaves() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = trained(dir.path(), 3, 5);
    let initial = dir.path().join("first.safetensors");
    std::fs::write(&initial, &first).expect("a file");
    let initial = initial.display().to_string();
    let alone = trained_from(dir.path(), 4, 15, &["--prompt-init", &format!("file:{initial}")]);
    let mut engine = Engine::start();
    engine.join(1, (1, 2));
    let digest = blake3::hash(&first).to_hex().to_string();
    let spec = v1::TrainingSpec {
        prompt_init: Some("file:prompt.safetensors".to_owned()),
        initial: Some(incipit_worker::spec::initial_of(&digest)),
        ..spec(4, 15)
    };
    let other = job("other", 1, self::spec(4, 15));
    let jobs = vec![other, LocalJob { tasks: vec![files(&initial)], ..job("spot", 1, spec.clone()) }];
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs }));
    let left = until_all_left(&mut engine, 2);
    assert_eq!(left["jobs/spot"].0.state(), JobState::Succeeded, "{:?}", left["jobs/spot"].0);
    assert!(left["jobs/spot"].1 == alone, "the prompt differs from that of `incipit train`");
    assert!(left["jobs/other"].1 != alone, "it does not start as its neighbour");

    let short = v1::TrainingSpec { prompt_length: Some(7), ..spec };
    let short = LocalJob { tasks: vec![files(&initial)], ..job("short", 1, short) };
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs: vec![short] }));
    let left = until_all_left(&mut engine, 1);
    let end = &left["jobs/short"].0;
    assert_eq!(end.state(), JobState::Failed);
    assert!(end.message.contains("8 rows, not 7; give --prompt-length 8"), "{end:?}");
}

#[test]
fn tasks_that_cannot_share_rows_end_their_job_with_the_mend() {
    let mut engine = Engine::start();
    engine.join(1, (1, 1));
    let two = |shared_length: u32, own: [v1::TrainingSpec; 2]| {
        let named = ["a", "b"].into_iter().zip(own);
        let tasks = named.map(|(name, own)| v1::TrainingTask { name: name.to_owned(), spec: Some(own) });
        v1::TrainingSpec { shared_length: Some(shared_length), tasks: tasks.collect(), ..spec(3, 5) }
    };
    let short = v1::TrainingSpec { prompt_length: Some(4), ..v1::TrainingSpec::default() };
    let slow = v1::TrainingSpec { lr: Some(0.1), ..v1::TrainingSpec::default() };
    let jobs = [
        ("short", two(4, [short, v1::TrainingSpec::default()]), "--shared-length"),
        ("slow", two(4, [v1::TrainingSpec::default(), slow]), "--lr differs between tasks"),
        ("one", v1::TrainingSpec { shared_length: Some(4), ..spec(3, 5) }, "fewer than two tasks"),
    ];
    for (name, spec, words) in &jobs {
        let tasks = vec![files(""); spec.tasks.len().max(1)];
        let local = LocalJob { tasks, ..job(name, 1, spec.clone()) };
        engine.tell(Order::Jobs(Jobs { epoch: 1, jobs: vec![local] }));
        let (end, _) = &until_all_left(&mut engine, 1)[&format!("jobs/{name}")];
        assert_eq!((end.state(), end.reason()), (JobState::Failed, JobReason::BadSpec), "{end:?}");
        assert!(end.message.contains(words), "{end:?}");
    }
}

#[test]
fn a_job_that_fails_or_is_cancelled_leaves_its_neighbour_as_it_was() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut engine = Engine::start();
    engine.join(1, (1, 1));
    let bad = v1::TrainingSpec { lr: Some(1e30), ..spec(5, 25) };
    let good = job("good", 1, spec(7, 25));
    let long = job("long", 1, spec(8, 1_000_000));
    let jobs = vec![good.clone(), job("bad", 1, bad), long.clone()];
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs }));
    engine.report(|report| report.job == "jobs/long" && matches!(report.report, Some(Report::Measured(_))));
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs: vec![good, wish(long, JobWish::Cancel)] }));
    let left = until_all_left(&mut engine, 2);
    assert_eq!(left["jobs/long"].0.state(), JobState::Cancelled);
    assert!(left["jobs/good"].1 == trained(dir.path(), 7, 25), "the neighbour differs");
}

#[test]
fn a_paused_job_goes_on_from_its_checkpoint_in_another_group_to_the_same_bytes() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut engine = Engine::start();
    engine.join(1, (1, 2));
    let first = job("p", 1, spec(3, 25));
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs: vec![first.clone()] }));
    engine.report(|report| matches!(report.report, Some(Report::Measured(_))));
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs: vec![wish(first, JobWish::Pause)] }));
    let saved = engine.hear(|notice| matches!(notice, Notice::Saved(_)));
    let Notice::Saved(saved) = saved else { unreachable!() };
    let left = until_all_left(&mut engine, 1);
    let step = left["jobs/p"].0.step;
    assert_eq!(left["jobs/p"].0.state(), JobState::Paused);
    assert!((1..25).contains(&step), "{step}");
    engine.join(2, (1, 2));
    let second = LocalJob { checkpoint: saved.dir, ..job("p", 2, spec(3, 25)) };
    engine.tell(Order::Jobs(Jobs { epoch: 2, jobs: vec![second] }));
    let started = engine.report(|report| matches!(report.report, Some(Report::Started(_))));
    assert!(matches!(started.report, Some(Report::Started(started)) if started.step == step));
    let left = until_all_left(&mut engine, 1);
    assert!(left["jobs/p"].1 == trained(dir.path(), 3, 25), "the prompt differs");
}

/// NCCL, for one, says its version and what it warns of on the standard output of its process.
#[cfg(target_os = "linux")]
#[test]
fn what_a_library_prints_on_standard_output_does_not_reach_the_frames() {
    use std::io::Write as _;

    let mut engine = Engine::start();
    engine.hear(|notice| matches!(notice, Notice::Alive(_)));
    let output = format!("/proc/{}/fd/1", engine.child.id());
    let mut output = std::fs::OpenOptions::new().append(true).open(output).expect("its standard output");
    writeln!(output, "NCCL version 2.30.1+cuda13.0").expect("a line");
    engine.join(1, (1, 1));
}

#[cfg(target_os = "linux")]
#[test]
fn a_job_whose_data_do_not_come_holds_up_no_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let pipe = dir.path().join("train.jsonl");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo starts");
    assert!(made.success(), "{made}");
    let mut engine = Engine::start();
    engine.join(1, (1, 1));
    let silent = LocalTask { train: pipe.display().to_string(), ..files("") };
    let silent = LocalJob { tasks: vec![silent], ..job("silent", 1, spec(1, 25)) };
    let jobs = vec![silent.clone(), job("quick", 1, spec(2, 5))];
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs }));
    assert_eq!(until_all_left(&mut engine, 1)["jobs/quick"].0.state(), JobState::Succeeded);
    engine.tell(Order::Jobs(Jobs { epoch: 1, jobs: vec![wish(silent, JobWish::Cancel)] }));
    assert_eq!(until_all_left(&mut engine, 1)["jobs/silent"].0.state(), JobState::Cancelled);
}
