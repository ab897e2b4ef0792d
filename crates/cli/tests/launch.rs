//! Ranks as processes: what `incipit launch` starts, and how it ends; and what torchrun and srun would start.

#![cfg(all(feature = "gloo", target_os = "linux"))]

mod common;

use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Ran, command, demo, few_examples, incipit, text, train, train_args};
use rustix::process::{Pid, Signal, kill_process};

/// Longer than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn words(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// A command as several processes.
fn launch(nproc: usize, args: &[&str]) -> Command {
    let nproc = nproc.to_string();
    command(&[&["launch", "--nproc", &nproc, "--"], args].concat())
}

fn launched(nproc: usize, args: &[&str]) -> Ran {
    launch(nproc, args).output().expect("the program starts").into()
}

/// A launched training run that would go on for long.
struct Running {
    child: Child,
    /// By rank.
    ranks: Vec<i32>,
}

impl Running {
    /// Returns when it has made a few steps.
    fn start(dir: &Path, nproc: usize, more: &[&str]) -> Self {
        let long = ["--steps", "1000000", "--eval-every", "1000000", "--checkpoint-every", "1000000"];
        let args = train_args(dir, "run", &[&long[..], more].concat());
        let mut process = launch(nproc, &words(&args));
        let mut child =
            process.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let metrics = dir.join("run/metrics.jsonl");
        until("a few steps", || {
            if let Some(status) = child.try_wait().expect("its state") {
                let mut said = String::new();
                let stderr = child.stderr.as_mut().expect("a pipe");
                stderr.read_to_string(&mut said).expect("text");
                panic!("the launch ended by itself, {status}: {said}");
            }
            std::fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() >= 3)
        });
        let ranks = (0..nproc).map(|rank| rank_of(child.id(), rank)).collect();
        Self { child, ranks }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a signal");
    }

    /// Waits for its end, and for that of the ranks.
    fn end(self) -> Ran {
        let start = Instant::now();
        let ran: Ran = self.child.wait_with_output().expect("the program ends").into();
        assert!(start.elapsed() < PATIENCE, "it took {:?}:\n{}", start.elapsed(), ran.stderr);
        for pid in self.ranks {
            until("the end of a rank", || !is_alive(pid));
        }
        ran
    }
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "no {what} in {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The process id of a rank.
fn rank_of(launcher: u32, rank: usize) -> i32 {
    let children = text(format!("/proc/{launcher}/task/{launcher}/children"));
    let mark = format!("RANK={rank}");
    let is_it = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let pids = children.split_whitespace().map(|pid| pid.parse().expect("a process id"));
    pids.into_iter().find(is_it).unwrap_or_else(|| panic!("no rank {rank} among {children:?}"))
}

/// Whether it runs: one that ended and was not yet asked about does not.
fn is_alive(pid: i32) -> bool {
    let state = |stat: String| stat.rsplit(')').next().and_then(|rest| rest.trim().chars().next());
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !matches!(state(stat), Some('Z' | 'X')))
}

#[test]
fn a_launched_run_leaves_what_one_process_leaves() {
    let dir = tempfile::tempdir().expect("a directory");
    let steps = ["--steps", "4", "--eval-every", "2"];
    let one = train(dir.path(), "one", &steps).ok().json();
    let args = train_args(dir.path(), "two", &[&steps[..], &["--dp", "2"]].concat());
    let two = launched(2, &words(&args)).ok();
    assert_eq!(two.json()["eval_loss"], one["eval_loss"]);
    assert_eq!(two.stderr.matches("step 4").count(), 1, "only rank 0 tells of steps:\n{}", two.stderr);
    for file in ["prompt.npy", "predictions.jsonl", "last/prompt.safetensors", "report.html"] {
        let bytes = |run: &str| std::fs::read(dir.path().join(run).join(file)).expect("a file");
        assert!(file == "report.html" || bytes("one") == bytes("two"), "{file} differs");
    }
}

#[test]
fn a_launched_ensemble_leaves_what_runs_of_its_seeds_leave() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "one", &["--steps", "2", "--seed", "1"]).ok();
    let mut args = train_args(dir.path(), "two", &["--steps", "2", "--members", "2", "--dp", "2"]);
    args.insert(0, "ensemble".to_owned());
    let members = launched(2, &words(&args)).ok().json()["members"].clone();
    assert_eq!((&members[1]["seed"], &members[1]["end"]), (&1.into(), &"all-steps".into()));
    let bytes =
        |run: &str| std::fs::read(dir.path().join(run).join("last/prompt.safetensors")).expect("a file");
    assert!(bytes("one") == bytes("two/member-1"));
}

#[test]
fn processes_measure_and_answer_as_one_does() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, data) = (demo("model"), few_examples(dir.path()));
    let eval = ["eval", "--json", "--model", &model, "--data", &data, "--max-target-length", "4"];
    let (one, two) =
        (incipit(&eval).ok().json(), launched(2, &[&eval[..], &["--dp", "2"]].concat()).ok().json());
    assert_eq!((&one["metrics"], &one["loss"]), (&two["metrics"], &two["loss"]));
    let generate = ["generate", "--model", &model, "--input", "a", "--input", "b", "--input", "c"];
    let answers = launched(2, &[&generate[..], &["--dp", "2"]].concat()).ok().stdout;
    assert_eq!(answers, incipit(&generate).ok().stdout);
}

#[test]
fn a_killed_rank_ends_the_launch_and_is_named_with_its_signal() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = Running::start(dir.path(), 2, &["--dp", "2"]);
    let killed = Pid::from_raw(running.ranks[1]).expect("a process");
    kill_process(killed, Signal::KILL).expect("a signal");
    let ran = running.end();
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("rank 1 failed first: killed by signal 9 (SIGKILL"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("rank 0 failed") && !ran.stderr.contains("stopping"), "{}", ran.stderr);
}

#[test]
fn what_one_rank_could_not_do_is_told_once_and_with_its_rank() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join("run")).expect("a directory");
    std::fs::write(dir.path().join("run/thesis.txt"), "years of work").expect("a file");
    let ran = launched(2, &words(&train_args(dir.path(), "run", &["--tp", "2"])));
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("not empty").count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("[rank 0] error: "), "{}", ran.stderr);
    assert!(ran.stderr.contains("rank 0 failed first: exit code 2"), "{}", ran.stderr);
}

#[test]
fn what_no_rank_can_do_is_told_once() {
    let dir = tempfile::tempdir().expect("a directory");
    for (more, part) in [(["--tp", "3"], "--tp 3 times --dp 1 makes 3"), (["--dp", "1"], "makes 1")] {
        let ran = launched(2, &words(&train_args(dir.path(), "run", &more)));
        assert_eq!((ran.code, ran.stderr.matches(part).count()), (2, 1), "{}", ran.stderr);
    }
    let ran = launched(2, &["eval", "--model", &demo("model"), "--dp", "2", "--data", "/nowhere.jsonl"]);
    assert_eq!((ran.code, ran.stderr.matches("/nowhere.jsonl").count()), (2, 1), "{}", ran.stderr);
    assert!(!dir.path().join("run").exists(), "a refused run leaves nothing");
}

#[test]
fn commands_that_are_not_for_ranks_are_refused() {
    for (args, part) in [
        (&["doctor"][..], "train, eval, generate"),
        (&["launch", "--nproc", "2", "--", "train"], "train, eval, generate"),
        (&["train", "--collective", "local"], "--collective local"),
        (&["train", "--modle", "x"], "a similar argument exists: '--model'"),
        (&["bench", "collective", "--ranks", "2"], "--ranks"),
    ] {
        let ran = launched(2, args);
        assert_eq!((ran.code, ran.stderr.matches(part).count()), (2, 1), "{}", ran.stderr);
    }
}

#[test]
fn ctrl_c_is_passed_on_and_ends_in_a_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = Running::start(dir.path(), 2, &["--dp", "2"]);
    running.signal(Signal::INT);
    let ran = running.end();
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    assert!(ran.stderr.contains("incipit launch --nproc 2 -- train"), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("stopping").count(), 1, "{}", ran.stderr);
    assert!(dir.path().join("run/last/MANIFEST").exists());
    let made = text(dir.path().join("run/metrics.jsonl")).lines().count();
    let (out, steps) = (dir.path().join("run").display().to_string(), (made + 1).to_string());
    let alone = ["--collective", "local", "--dp", "1", "--steps", &steps];
    let resumed = incipit(&[&["train", "--out", &out, "--resume"], &alone[..]].concat()).ok();
    assert!(resumed.stderr.contains("going on after step"), "{}", resumed.stderr);
}

#[test]
fn a_rank_that_hangs_is_missed_and_ended() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = Running::start(dir.path(), 2, &["--dp", "2", "--deadline", "1"]);
    let stopped = Pid::from_raw(running.ranks[1]).expect("a process");
    kill_process(stopped, Signal::STOP).expect("a signal");
    let ran = running.end();
    assert_eq!(ran.code, 4, "{}", ran.stderr);
    assert!(ran.stderr.contains("rank 1 did not come within 1 s"), "{}", ran.stderr);
}

#[test]
fn a_launcher_that_is_killed_leaves_no_rank() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = Running::start(dir.path(), 2, &["--dp", "2"]);
    running.signal(Signal::KILL);
    running.end();
}

/// Ranks as another launcher starts them.
fn ranks(args: &[&str], variables: &[(&str, &str)]) -> Vec<Child> {
    let rank = |rank: &str| {
        let mut rank_process = command(args);
        rank_process.envs(variables.iter().copied()).env("RANK", rank).env("LOCAL_RANK", rank);
        rank_process.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
    };
    ["0", "1"].map(rank).into()
}

/// A port that is free, whose next one is free, and that is held while the listener is.
fn port() -> TcpListener {
    let free = |_| {
        let listener = TcpListener::bind("127.0.0.1:0").ok()?;
        let next = listener.local_addr().ok()?.port().checked_add(1)?;
        TcpListener::bind(("127.0.0.1", next)).is_ok().then_some(listener)
    };
    (0..100).find_map(free).expect("two free ports")
}

#[test]
fn torchruns_environment_is_understood() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, data) = (demo("model"), few_examples(dir.path()));
    let eval = ["eval", "--json", "--model", &model, "--data", &data, "--max-target-length", "4"];
    let alone = incipit(&eval).ok().json();
    let gloo = [&eval[..], &["--dp", "2", "--collective", "gloo"]].concat();
    let listener = port();
    let number = listener.local_addr().expect("an address").port().to_string();
    let common = [("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")];
    let check = |children: Vec<Child>| {
        let ended: Vec<Ran> =
            children.into_iter().map(|c| c.wait_with_output().expect("an end").into()).collect();
        let said: Vec<_> = ended.iter().map(|ran| (ran.code, &ran.stderr)).collect();
        assert!(ended.iter().all(|ran| ran.code == 0), "{said:?}");
        assert_eq!((&ended[0].json()["loss"], ended[1].stdout.as_str()), (&alone["loss"], ""));
        assert_eq!(ended[1].stderr, "", "rank 1 has nothing to say");
    };
    // The port is torchrun's own: the ranks take the next one.
    let agent = [("MASTER_PORT", &*number), ("TORCHELASTIC_USE_AGENT_STORE", "True")];
    check(ranks(&gloo, &[&common[..], &agent].concat()));
    drop(listener);
    check(ranks(&gloo, &[&common[..], &agent[..1]].concat()));
    let store = format!("file:{}", dir.path().join("meet").display());
    check(ranks(&gloo, &[("WORLD_SIZE", "2"), ("INCIPIT_STORE", &store)]));
}

#[test]
fn a_rank_that_lost_another_says_so_by_its_exit_code() {
    let dir = tempfile::tempdir().expect("a directory");
    let more = ["--dp", "2", "--collective", "gloo", "--steps", "1000000", "--deadline", "5"];
    let args = train_args(dir.path(), "run", &more);
    let store = format!("file:{}", dir.path().join("meet").display());
    let mut started = ranks(&words(&args), &[("WORLD_SIZE", "2"), ("INCIPIT_STORE", &store)]);
    until("a first step", || {
        std::fs::read_to_string(dir.path().join("run/metrics.jsonl")).is_ok_and(|text| !text.is_empty())
    });
    started[0].kill().expect("a signal");
    let ended: Vec<Ran> = started.drain(..).map(|c| c.wait_with_output().expect("an end").into()).collect();
    assert_eq!(ended[1].code, 4, "{}", ended[1].stderr);
    assert!(ended[1].stderr.lines().any(|line| line.starts_with("[rank 1] error: ")), "{}", ended[1].stderr);
}

#[test]
fn environments_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let args = train_args(dir.path(), "run", &["--dp", "2", "--collective", "gloo"]);
    for (variables, part) in [
        (&[][..], "RANK and WORLD_SIZE are not set"),
        (&[("RANK", "1")], "WORLD_SIZE is not set"),
        (&[("RANK", "2"), ("WORLD_SIZE", "2")], "RANK=2 contradicts WORLD_SIZE=2"),
        (&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR and MASTER_PORT"),
        (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("INCIPIT_STORE", "udp://x")], "udp://x"),
        (&[("RANK", "0"), ("WORLD_SIZE", "3"), ("INCIPIT_STORE", "file:/nowhere")], "3 ranks were started"),
    ] {
        let ran: Ran =
            command(&words(&args)).envs(variables.iter().copied()).output().expect("an end").into();
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert!(
            ran.stderr.contains(part) && !ran.stderr.contains("panicked"),
            "no {part:?} in {}",
            ran.stderr
        );
    }
    assert!(!dir.path().join("run").exists(), "a refused run leaves nothing");
}

#[test]
fn bench_times_what_processes_exchange() {
    let ran = launched(2, &["bench", "collective", "--json", "--sizes", "1KB,4KB", "--steps", "2"]).ok();
    let seen = ran.json();
    assert_eq!((&seen["collective"], &seen["ranks"]), (&"gloo".into(), &2.into()));
    assert_eq!(seen["operations"].as_array().map(Vec::len), Some(5));
    let step = ["bench", "step", "--json", "--shape", &demo("model"), "--lengths", "3x10", "--steps", "2"];
    let seen = launched(2, &[&step[..], &["--tp", "2"]].concat()).ok().json();
    assert_eq!((&seen["tp"], &seen["collective"]), (&2.into(), &"gloo".into()));
    assert!(seen["peak_rss_mb"].as_f64().expect("a number") > 1.0 && seen["loss"].is_number(), "{seen}");
    let share = seen["collective_share"].as_f64().expect("a share");
    assert!(share > 0.0 && share < 1.0, "{seen}");
}
