//! `cluster/slurm`: its scripts on a real Slurm of four nodes, all of them this machine. Workers are killed, their time runs out, and a
//! node is lost; the job always ends well.
#![cfg(feature = "gloo")]

mod common;
mod rig;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use common::{arg, command, copy, demo, root};
use rig::{Running, free_port, skipped, until};

/// Nodes: one for the coordinator, two for workers, one to spare.
const NODES: usize = 4;
/// Steps of the job: enough to be disturbed in the middle.
const STEPS: u64 = 200;
/// Steps from one checkpoint to the next.
const EVERY: u64 = 20;

/// One at a time: they share two cores.
static TURN: Mutex<()> = Mutex::new(());

/// A Slurm with its authentication, in a folder of its own.
struct Slurm {
    dir: tempfile::TempDir,
    daemons: Vec<(String, Running)>,
}

impl Slurm {
    /// Starts one, or says why there is none.
    fn start() -> Result<Option<Self>> {
        let programs =
            ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo"];
        let missing = programs.iter().find(|program| found(program).is_none());
        if let Some(missing) = missing {
            return skipped(&format!(
                "there is no {missing}; `apt-get install slurmctld slurmd slurm-client munge`"
            ));
        }
        if !rustix::process::geteuid().is_root() {
            return skipped("Slurm's daemons want to be root");
        }
        // Jobs' programs are started by Slurm, which looks at the folders above them.
        let dir = tempfile::Builder::new().prefix("incipit-slurm-").tempdir_in("/tmp")?;
        let mut slurm = Self { dir, daemons: Vec::new() };
        slurm.configure()?;
        let (key, socket) = (arg(slurm.path("munge.key")), arg(slurm.path("munge.socket")));
        let munge = ["--foreground", "--force", "--key-file", &key, "--socket", &socket];
        let files =
            [("--pid-file", "munged.pid"), ("--log-file", "munged.log"), ("--seed-file", "munged.seed")];
        let files = files.map(|(flag, file)| [flag.to_owned(), arg(slurm.path(file))]).concat();
        slurm.daemon("munged", "munged", &[munge.map(str::to_owned).to_vec(), files].concat())?;
        until("munged listens", 10, || Ok(Path::new(&socket).exists()))?;
        slurm.daemon("slurmctld", "slurmctld", &["-D".to_owned(), "-c".to_owned()])?;
        for node in 0..NODES {
            slurm.node(node)?;
        }
        until("all nodes are idle", 60, || {
            Ok(slurm.run("sinfo", &["-h", "-t", "idle", "-o", "%D"])?.trim() == NODES.to_string())
        })?;
        Ok(Some(slurm))
    }

    fn node(&mut self, node: usize) -> Result<()> {
        self.daemon(
            &format!("node{node}"),
            "slurmd",
            &["-D".to_owned(), "-N".to_owned(), format!("node{node}")],
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        // munged wants nobody else to write to the folders of its files, and everybody to reach its socket.
        fs::set_permissions(self.dir.path(), fs::Permissions::from_mode(0o755))?;
        let key = self.path("munge.key");
        let mut bytes = Vec::new();
        while bytes.len() < 1024 {
            bytes.extend(std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0).to_le_bytes());
        }
        fs::write(&key, bytes)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o400))?;
        let mut ports = Vec::new();
        while ports.len() < NODES + 1 {
            let port = free_port()?;
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        let nodes = (0..NODES).map(|node| {
            fs::create_dir_all(self.path(&format!("spool/node{node}")))?;
            Ok(format!(
                "NodeName=node{node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={} CPUs=2 RealMemory=4000 State=UNKNOWN\n",
                ports[node]
            ))
        });
        let nodes = nodes.collect::<Result<String>>()?;
        fs::create_dir_all(self.path("state"))?;
        let dir = arg(self.dir.path());
        let text = CONFIGURATION.replace("DIR", &dir).replace("PORT", &ports[NODES].to_string());
        let partition =
            format!("PartitionName=main Nodes=node[0-{}] Default=YES MaxTime=INFINITE State=UP\n", NODES - 1);
        Ok(fs::write(self.path("slurm.conf"), text + &nodes + &partition)?)
    }

    fn daemon(&mut self, name: &str, program: &str, args: &[String]) -> Result<()> {
        let log = fs::File::create(self.path(&format!("{name}.out")))?;
        let mut command = Command::new(found(program).context("it was there")?);
        command.args(args).env("SLURM_CONF", self.path("slurm.conf")).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        self.daemons.push((name.to_owned(), Running::start(&mut command)?));
        Ok(())
    }

    /// A command as a person gives it, in this cluster, with the variables that the scripts know.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("SLURM_CONF", self.path("slurm.conf")).env("INCIPIT_HOME", self.path("home"));
        command.env("INCIPIT", common::program()?).env("INCIPIT_HOST", "localhost");
        Ok(command)
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.command(program, args)?.output()?;
        ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn sbatch(&self, script: &str, flags: &[&str]) -> Result<String> {
        let script = arg(root().canonicalize()?.join("cluster/slurm").join(script));
        self.run("sbatch", &[&["--parsable"], flags, &[script.as_str()]].concat())
    }

    /// The coordinator, by its script; it is to be used once its address is published.
    fn coordinator(&self) -> Result<()> {
        copy(Path::new(&demo("model")), &self.path("home/models/demo"))?;
        let (grpc, http) = (free_port()?, free_port()?);
        let ports = format!("ALL,INCIPIT_PORT={grpc},INCIPIT_HTTP=127.0.0.1:{http}");
        self.sbatch("coordinator.sbatch", &["--export", &ports])?;
        until("the coordinator says where it is", 60, || Ok(self.path("home/endpoint").exists()))
    }

    /// `train.sh`, as a person runs it.
    fn train(&self) -> Result<Running> {
        let (steps, every) = (STEPS.to_string(), EVERY.to_string());
        let train = arg(root().canonicalize()?.join("cluster/slurm/train.sh"));
        let data = [demo("data/train.jsonl"), demo("data/eval.jsonl")];
        let args = [
            "job",
            "demo",
            "--train",
            &data[0],
            "--eval",
            &data[1],
            "--steps",
            &steps,
            "--checkpoint-every",
            &every,
        ];
        let args =
            [&args[..], &["--eval-every", &steps, "--batch-size", "8", "--prompt-length", "8"]].concat();
        let log = fs::File::create(self.path("train.out"))?;
        let mut command = self.command(train, &args)?;
        Running::start(command.env("TP", "2").stdout(log.try_clone()?).stderr(log))
    }

    /// The program as a client of this cluster.
    fn ask(&self, args: &[&str]) -> Result<Value> {
        let mut command = command(&[args, &["--json"]].concat())?;
        command.env("INCIPIT_COORDINATOR", fs::read_to_string(self.path("home/endpoint"))?.trim());
        command.env("INCIPIT_CA", self.path("home/coordinator/tls/ca.pem"));
        command.env("INCIPIT_TOKEN", fs::read_to_string(self.path("home/admin.token"))?.trim());
        let output = command.output()?;
        ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Waits until the job has a checkpoint of this step, or a later one.
    fn committed(&self, step: u64) -> Result<()> {
        until(&format!("step {step} is saved"), 120, || {
            let Ok(job) = self.ask(&["job", "get", "job"]) else { return Ok(false) };
            if ["FAILED", "CANCELLED"]
                .iter()
                .any(|state| job["state"].as_str().is_some_and(|found| found.contains(state)))
            {
                bail!("{job:#}");
            }
            Ok(number(&job["progress"]["committedStep"]) >= step)
        })
    }

    /// Fails, with all that was said, unless the job ended well after at least so many attempts. Returns the step from which the last went on.
    fn ended_well(&self, train: &mut Running, attempts: usize) -> Result<u64> {
        let said = || -> String { fs::read_to_string(self.path("train.out")).unwrap_or_default() };
        let mut code = None;
        until("the job ends", 240, || {
            code = train.0.try_wait()?;
            Ok(code.is_some())
        })
        .with_context(said)?;
        let job = self.ask(&["job", "get", "job"])?;
        let made = job["attempts"].as_array().context("attempts")?;
        let starts: Vec<u64> = made.iter().map(|attempt| number(&attempt["startStep"])).collect();
        println!("attempts began at {starts:?} of {STEPS}");
        ensure!(code.is_some_and(|code| code.success()), "{}", said());
        ensure!(job["state"].as_str().is_some_and(|state| state.contains("SUCCEEDED")), "{job:#}");
        ensure!(made.len() >= attempts && starts.is_sorted() && starts.last() > Some(&0), "{job:#}");
        starts.last().copied().context("an attempt")
    }

    /// Processes that Slurm runs on a node, and those that watch over them.
    fn on_node(&self, node: &str) -> Result<Vec<Pid>> {
        let marks =
            [format!("SLURMD_NODENAME={node}"), format!("SLURM_CONF={}", arg(self.path("slurm.conf")))];
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let Some(pid) =
                path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            let environment = fs::read(path.join("environ")).unwrap_or_default();
            let has =
                |mark: &String| environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes());
            if !marks.iter().all(has) {
                continue;
            }
            found.push(pid);
            let status = fs::read_to_string(path.join("status")).unwrap_or_default();
            let parent = status
                .lines()
                .find_map(|line| line.strip_prefix("PPid:")?.trim().parse::<i32>().ok())
                .unwrap_or(0);
            let name = fs::read_to_string(format!("/proc/{parent}/comm")).unwrap_or_default();
            found.extend((name.trim() == "slurmstepd").then_some(parent));
        }
        Ok(found.into_iter().filter_map(Pid::from_raw).collect())
    }

    /// What a node's power switch does: everything on it is gone at once, and nobody says so.
    fn lose(&mut self, node: &str) -> Result<()> {
        self.daemons.retain(|(name, _)| name != node);
        let pids = self.on_node(node)?;
        ensure!(!pids.is_empty(), "nothing runs on {node}");
        for pid in pids {
            let _ = kill_process(pid, Signal::KILL);
        }
        Ok(())
    }

    /// The node where a job of Slurm's runs, as soon as it does.
    fn node_of(&self, job: &str) -> Result<String> {
        let mut node = String::new();
        until(&format!("job {job} runs"), 60, || {
            node = self.run("squeue", &["-h", "-j", job, "-t", "R", "-o", "%N"])?;
            Ok(!node.is_empty())
        })?;
        Ok(node)
    }

    /// The logs, for whoever has to find out what went wrong.
    fn logs(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|end| end == "log" || end == "out") {
                let said = fs::read_to_string(&path).unwrap_or_default();
                let tail: Vec<&str> = said.lines().rev().take(40).collect();
                text += &format!("--- {}\n", path.display());
                tail.iter().rev().for_each(|line| text += &format!("{line}\n"));
            }
        }
        text
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        let _ = self.run("scancel", &["--user", "root"]);
        let _ = until("all jobs are gone", 20, || Ok(self.run("squeue", &["-h"])?.is_empty()));
        for node in 0..NODES {
            for pid in self.on_node(&format!("node{node}")).unwrap_or_default() {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// As small as it can be. `cred_expire`: how long a requeued job waits (2 minutes where nothing is said). `SlurmdTimeout`: after which a
/// silent node is down (5 minutes where nothing is said).
const CONFIGURATION: &str = "\
ClusterName=incipit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=PORT
AuthType=auth/munge
AuthInfo=socket=DIR/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=DIR/state
SlurmdSpoolDir=DIR/spool/%n
SlurmctldPidFile=DIR/slurmctld.pid
SlurmdPidFile=DIR/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=30
";

fn found(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    path.split(':').map(|folder| Path::new(folder).join(program)).find(|path| path.is_file())
}

/// A number of canonical JSON, which has large ones as text.
fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

/// Runs `test` with a Slurm, and shows the logs if it fails.
fn with_slurm(test: impl FnOnce(&mut Slurm) -> Result<()>) -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut slurm) = Slurm::start()? else { return Ok(()) };
    test(&mut slurm).with_context(|| slurm.logs())
}

#[test]
#[ignore = "long: a Slurm of four nodes, and a node that is lost"]
fn a_lost_node_costs_its_worker_and_slurm_starts_it_on_another() -> Result<()> {
    with_slurm(|slurm| {
        slurm.coordinator()?;
        let workers = slurm.sbatch("workers.sbatch", &["--nodes=1", "--array=0-1"])?;
        let mut train = slurm.train()?;
        slurm.committed(2 * EVERY)?;
        let (stays, node) =
            (slurm.node_of(&format!("{workers}_0"))?, slurm.node_of(&format!("{workers}_1"))?);
        slurm.lose(&node)?;
        println!("{node} is lost");
        until("Slurm has noticed", 60, || {
            Ok(slurm.run("squeue", &["-h", "-t", "R", "-w", &node])?.is_empty())
        })?;
        let other = slurm.node_of(&format!("{workers}_1"))?;
        println!("its worker is on {other} now");
        ensure!(
            other != node && slurm.node_of(&format!("{workers}_0"))? == stays,
            "the other worker was moved"
        );
        slurm.ended_well(&mut train, 2)?;
        Ok(())
    })
}

#[test]
#[ignore = "long: a Slurm of four nodes"]
fn workers_of_one_job_are_started_again_when_they_crash_and_when_their_time_is_up() -> Result<()> {
    with_slurm(|slurm| {
        slurm.coordinator()?;
        let workers = slurm.sbatch("workers.sbatch", &["--nodes=2"])?;
        let mut train = slurm.train()?;
        slurm.committed(EVERY)?;

        // A crash: the script starts the worker again, within the job.
        let state = arg(slurm.path("home/workers/slurm-0-1"));
        let worker = worker_process(&state)?;
        kill_process(worker, Signal::KILL)?;
        slurm.committed(4 * EVERY)?;

        // The time is up: all is saved, and the job comes back. Slurm's signal comes to the engines as well, which may not mind.
        let mut reached = 0;
        until("the job is between two checkpoints", 60, || {
            reached = number(&slurm.ask(&["job", "get", "job"])?["progress"]["step"]);
            Ok((4..EVERY - 6).contains(&(reached % EVERY)))
        })?;
        slurm.run("scancel", &["--batch", "--signal=TERM", &workers])?;
        let restarts = || slurm.run("scontrol", &["show", "job", &workers]);
        until("Slurm has started the workers again", 90, || {
            Ok(restarts()?.contains("Restarts=1") && restarts()?.contains("JobState=RUNNING"))
        })?;
        let said = fs::read_to_string(slurm.path(&format!("incipit-workers-{workers}.log")))?;
        ensure!(said.matches("ended with code 0").count() == 2, "both were drained in time:\n{said}");
        let last = slurm.ended_well(&mut train, 3)?;
        ensure!(last >= reached, "it had made {reached} steps when the time was up, and went on from {last}");
        Ok(())
    })
}

/// The worker's process that has this state directory.
fn worker_process(state: &str) -> Result<Pid> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(line) = fs::read(path.join("cmdline")) else { continue };
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if words.get(1) == Some(&&b"worker"[..]) && words.contains(&state.as_bytes()) {
            let pid = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            return pid.and_then(Pid::from_raw).context("a process id");
        }
    }
    bail!("no worker has {state}")
}
