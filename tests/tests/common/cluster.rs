//! A cluster of real processes on this machine, to be disturbed.

mod calls;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use incipit_proto::client::{Client, ClientConfig};
use incipit_proto::v1;
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;

use super::command;

/// A file of the demo. Paths that cross the wire are whole ones.
pub(crate) fn demo(path: &str) -> String {
    let path = super::demo(path);
    std::fs::canonicalize(&path).map_or(path, |path| path.display().to_string())
}

/// A new id for a request.
pub(crate) fn id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Longest that anything here is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// A coordinator and its workers. Whatever runs is killed with this.
pub(crate) struct Cluster {
    dir: PathBuf,
    pub(crate) port: u16,
    pub(crate) coordinator: Option<Child>,
    pub(crate) workers: BTreeMap<String, Child>,
    runtime: Runtime,
    door: Option<Door>,
    /// Variables of its processes.
    variables: Vec<(&'static str, PathBuf)>,
    /// How long a call is made again, while the coordinator comes back.
    pub(crate) persistence: Duration,
}

/// How a coordinator is reached from other machines: with TLS and tokens.
struct Door {
    address: Ipv4Addr,
    token: String,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let children = self.coordinator.iter_mut().chain(self.workers.values_mut());
        children.for_each(|child| {
            let _ = child.kill();
            let _ = child.wait();
        });
    }
}

impl Cluster {
    /// A coordinator without workers, with everything under `dir`.
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let mut cluster = Self::new(dir, Ipv4Addr::LOCALHOST)?;
        cluster.start_coordinator()?;
        Ok(cluster)
    }

    /// The same, with variables for all processes.
    pub(crate) fn start_with(dir: &Path, variables: Vec<(&'static str, PathBuf)>) -> Result<Self> {
        let mut cluster = Self::new(dir, Ipv4Addr::LOCALHOST)?;
        cluster.variables = variables;
        cluster.start_coordinator()?;
        Ok(cluster)
    }

    /// The same, for workers on other machines, which reach it at this address.
    pub(crate) fn start_at(dir: &Path, address: Ipv4Addr) -> Result<Self> {
        let mut cluster = Self::new(dir, address)?;
        let (data, host) = (cluster.data(), address.to_string());
        let made = super::incipit(&["coordinator", "init", "--data", &data, "--host", &host])?.ok()?;
        let token = made.stdout.lines().find_map(|line| line.strip_prefix("admin token"));
        let token = token.context("no token")?.trim().to_owned();
        cluster.door = Some(Door { address, token });
        cluster.start_coordinator()?;
        Ok(cluster)
    }

    fn new(dir: &Path, address: Ipv4Addr) -> Result<Self> {
        let port = TcpListener::bind((address, 0))?.local_addr()?.port();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self {
            dir: dir.to_owned(),
            port,
            coordinator: None,
            workers: BTreeMap::new(),
            runtime,
            door: None,
            variables: Vec::new(),
            persistence: Duration::from_secs(20),
        })
    }

    fn data(&self) -> String {
        self.dir.join("coordinator").display().to_string()
    }

    /// A file of the coordinator's certificates.
    fn tls(&self, file: &str) -> PathBuf {
        self.dir.join("coordinator/tls").join(file)
    }

    pub(crate) fn start_coordinator(&mut self) -> Result<()> {
        let (data, listen) = (self.data(), format!("{}:{}", self.address(), self.port));
        let roots = ["--model-root", "/", "--data-root", "/", "-v"];
        let mut command =
            command(&[&["coordinator", "--data", &data, "--listen", &listen], &roots[..]].concat())?;
        if self.door.is_none() {
            command.arg("--insecure");
        }
        command.envs(self.variables.iter().cloned());
        self.coordinator = Some(command.stderr(self.log_file("coordinator")?).spawn()?);
        self.wait_for("the coordinator to answer", |cluster| Ok(cluster.client().is_ok().then_some(())))
    }

    pub(crate) fn start_worker(&mut self, name: &str) -> Result<()> {
        self.start_worker_with(name, 4)
    }

    /// A worker with room for so many ranks.
    pub(crate) fn start_worker_with(&mut self, name: &str, slots: u32) -> Result<()> {
        let command = self.worker(name, slots)?;
        self.spawn_worker(name, command)
    }

    /// Starts a worker by a command that was made by [`Cluster::worker`].
    pub(crate) fn spawn_worker(&mut self, name: &str, mut command: Command) -> Result<()> {
        self.workers.insert(name.to_owned(), command.stderr(self.log_file(name)?).spawn()?);
        Ok(())
    }

    /// The program as a worker.
    pub(crate) fn worker(&self, name: &str, slots: u32) -> Result<Command> {
        let (state, endpoint, slots) = (self.dir.join(name), self.endpoint(), slots.to_string());
        let state = state.display().to_string();
        let args = [
            "worker",
            "--coordinator",
            &endpoint,
            "--name",
            name,
            "--slots",
            &slots,
            "--state-dir",
            &state,
            "-v",
        ];
        let mut command = command(&args)?;
        command.envs(self.variables.iter().cloned());
        if self.door.is_some() {
            let files = [("--ca", "ca.pem"), ("--cert", "worker.pem"), ("--key", "worker-key.pem")];
            command.args(files.iter().flat_map(|(flag, file)| [(*flag).into(), self.tls(file)]));
        }
        Ok(command)
    }

    fn log_file(&self, name: &str) -> Result<Stdio> {
        let path = self.dir.join(format!("{name}.log"));
        Ok(std::fs::File::options().create(true).append(true).open(path)?.into())
    }

    /// What all have logged, for a test that failed.
    pub(crate) fn logs(&self) -> String {
        let names = ["coordinator"].into_iter().chain(self.workers.keys().map(String::as_str));
        names
            .map(|name| {
                let text = std::fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(40)..].join("\n"))
            })
            .collect()
    }

    fn address(&self) -> Ipv4Addr {
        self.door.as_ref().map_or(Ipv4Addr::LOCALHOST, |door| door.address)
    }

    pub(crate) fn endpoint(&self) -> String {
        let scheme = if self.door.is_some() { "https" } else { "http" };
        format!("{scheme}://{}:{}", self.address(), self.port)
    }

    /// A new connection.
    pub(crate) fn client(&self) -> Result<Client> {
        let mut config = ClientConfig::new(self.endpoint());
        config.connect_timeout = Duration::from_secs(1);
        if let Some(door) = &self.door {
            (config.token, config.ca) = (Some(door.token.clone()), Some(self.tls("ca.pem")));
        }
        Ok(self.runtime.block_on(Client::connect(&config))?)
    }

    /// Makes calls, also while the coordinator comes back.
    pub(crate) fn call<T>(&self, call: impl AsyncFn(Client) -> Result<T, tonic::Status>) -> Result<T> {
        let start = Instant::now();
        loop {
            let done = self.client().and_then(|client| Ok(self.runtime.block_on(call(client))?));
            match done {
                Ok(done) => return Ok(done),
                Err(error) if start.elapsed() > self.persistence => return Err(error),
                Err(error) => {
                    let status = error.downcast_ref::<tonic::Status>().map(tonic::Status::code);
                    let passing = [tonic::Code::Unavailable, tonic::Code::Unknown, tonic::Code::Cancelled];
                    if status.is_some_and(|code| !passing.contains(&code)) {
                        return Err(error);
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Waits until there is something.
    pub(crate) fn wait_for<T>(&self, what: &str, find: impl Fn(&Self) -> Result<Option<T>>) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(found) = find(self)? {
                return Ok(found);
            }
            if start.elapsed() > PATIENCE {
                bail!("waited in vain for {what}\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Kills a worker's agent, whose process that was is returned.
    pub(crate) fn kill_worker(&mut self, name: &str) -> Result<u32> {
        let mut agent = self.workers.remove(name).context("it runs")?;
        let killed = agent.kill();
        agent.wait()?;
        killed?;
        Ok(agent.id())
    }

    pub(crate) fn kill_coordinator(&mut self) -> Result<()> {
        let mut coordinator = self.coordinator.take().context("it runs")?;
        let killed = coordinator.kill();
        coordinator.wait()?;
        Ok(killed?)
    }

    /// Kills a process at once, or stops it where it stands.
    pub(crate) fn signal(pid: u32, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(pid.try_into()?).context("a process")?;
        Ok(kill_process(pid, signal)?)
    }
}

/// Examples and steps of a job that takes a moment.
pub(crate) fn spec(seed: u64, steps: u64) -> v1::TrainingSpec {
    let source = |file: &str| v1::DataSource {
        file_name: file.to_owned(),
        source: Some(v1::data_source::Source::Path(demo(&format!("data/{file}")))),
    };
    v1::TrainingSpec {
        train: Some(source("train.jsonl")),
        prompt_length: Some(8),
        batch_size: Some(8),
        steps: Some(steps),
        checkpoint_every: Some(20),
        seed: Some(seed),
        ..v1::TrainingSpec::default()
    }
}

/// The prompt that `incipit train` makes of [`spec`].
pub(crate) fn trained(dir: &Path, seed: u64, steps: u64, (tp, dp): (u32, u32)) -> Result<Vec<u8>> {
    let out = dir.join(format!("alone-{seed}-{steps}"));
    let (model, train, out_arg) = (demo("model"), demo("data/train.jsonl"), out.display().to_string());
    let [seed, steps, tp, dp] = [seed, steps, u64::from(tp), u64::from(dp)].map(|number| number.to_string());
    super::incipit(&[
        "train",
        "--model",
        &model,
        "--train",
        &train,
        "--out",
        &out_arg,
        "--dtype",
        "f32",
        "--prompt-length",
        "8",
        "--batch-size",
        "8",
        "--steps",
        &steps,
        "--checkpoint-every",
        "20",
        "--seed",
        &seed,
        "--tp",
        &tp,
        "--dp",
        &dp,
        "-q",
    ])?
    .ok()?;
    Ok(std::fs::read(out.join("last/prompt.safetensors"))?)
}

/// Processes whose parent or group is gone would show here: those that hold a backbone for the agent `pid`.
pub(crate) fn engines_of(agent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let agent = agent.to_string();
        if words.get(1) == Some(&&b"engine"[..]) && words.contains(&agent.as_bytes()) {
            found.push(pid);
        }
    }
    found
}
