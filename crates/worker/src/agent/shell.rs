//! The agent's shell: brings what happens to the core, and does what it wants done.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use incipit_proto::client::Client;
use incipit_proto::names::WorkerName;
use incipit_proto::v1::{self, AttachRequest};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{Instrument as _, Span, field};

use crate::agent::core::{Action, Config, Core, Delay, FileKey, Input, Time};
use crate::agent::files::Files;
use crate::agent::persist::{Stopped, Word, persist};
use crate::agent::process::Process;
use crate::agent::{AgentConfig, Error, Key, line};
use crate::frames::{Join, Notice, Order};

/// How often the core is told that time has passed.
const TICK: Duration = Duration::from_millis(100);
/// What engines have said and the core has not heard, at most.
const WAITING: usize = 256;

/// Runs an agent until somebody asks it to end by `signals`: once, and it saves everything first; twice, and it ends at once. Is to
/// run on the main thread of the process: the system ends engines with the thread that has started them.
///
/// # Errors
/// If its directory cannot be used, or the coordinator will never take it.
pub async fn run(config: AgentConfig, mut signals: mpsc::Receiver<()>) -> Result<(), Error> {
    let _lock = lock(&config.state_dir)?;
    let mut shell = Shell::new(config)?;
    let (events_sender, mut events) = mpsc::channel(WAITING);
    let line = tokio::spawn(line::keep(shell.config.coordinator.clone(), events_sender));
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !shell.is_done() {
        let input = tokio::select! {
            Some(()) = signals.recv() => Input::Terminate,
            Some(event) = events.recv() => shell.on_line(event),
            _ = ticks.tick() => Input::Tick,
            Some(input) = shell.done.recv() => input,
            Some(input) = shell.engines.recv(), if !shell.core.is_full() => input,
        };
        shell.handle(input);
    }
    line.abort();
    match shell.given_up {
        Some(why) => Err(Error::TurnedAway(why)),
        None => Ok(()),
    }
}

struct Shell {
    config: AgentConfig,
    core: Core,
    began: Instant,
    files: Files,
    processes: BTreeMap<Key, Process>,
    /// The spans of engines that are not ready.
    joining: BTreeMap<Key, Span>,
    /// Files of jobs that are on their way to here.
    fetching: BTreeMap<FileKey, AbortHandle>,
    outgoing: Option<mpsc::UnboundedSender<AttachRequest>>,
    /// The newest connection, for those who carry files.
    client: watch::Sender<Option<Client>>,
    engines: mpsc::Receiver<Input>,
    engines_sender: mpsc::Sender<Input>,
    /// What was fetched and stored.
    done: mpsc::Receiver<Input>,
    done_sender: mpsc::Sender<Input>,
    exiting: bool,
    /// Why the agent ends, if nobody asked it to.
    given_up: Option<String>,
}

impl Shell {
    fn new(mut config: AgentConfig) -> Result<Self, Error> {
        let worker = WorkerName::of_id("worker", &config.worker_id)?;
        config.coordinator.worker = Some(worker.to_string());
        let files = Files::open(&config.state_dir).map_err(|error| {
            let source = std::io::Error::other(error.to_string());
            Error::StateDir { action: "use", path: config.state_dir.clone(), source }
        })?;
        let core = Core::new(Config {
            worker: worker.to_string(),
            incarnation: uuid::Uuid::new_v4().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: machine(config.gpus.clone()),
            slots: config.slots,
            outbox: files.outbox().to_string_lossy().into_owned(),
            drain: config.drain.as_millis() as Time,
            address: config
                .address
                .clone()
                .or_else(|| local_address(&config.coordinator.endpoint))
                .unwrap_or_default(),
        });
        let (engines_sender, engines) = mpsc::channel(WAITING);
        let (done_sender, done) = mpsc::channel(WAITING);
        Ok(Self {
            config,
            core,
            began: Instant::now(),
            files,
            processes: BTreeMap::new(),
            joining: BTreeMap::new(),
            fetching: BTreeMap::new(),
            outgoing: None,
            client: watch::Sender::new(None),
            engines,
            engines_sender,
            done,
            done_sender,
            exiting: false,
            given_up: None,
        })
    }

    /// Whether all is done, and no engine is left.
    fn is_done(&self) -> bool {
        self.exiting && self.processes.is_empty()
    }

    fn on_line(&mut self, event: line::Event) -> Input {
        match event {
            line::Event::Up(client, outgoing) => {
                self.outgoing = Some(outgoing);
                self.client.send_replace(Some(client));
                Input::Connected
            }
            line::Event::Received(response) => Input::Received(response),
            line::Event::Down => {
                self.outgoing = None;
                Input::Disconnected
            }
            line::Event::TurnedAway(problem) => Input::TurnedAway(problem.to_string()),
            line::Event::Missing => Input::Missing,
        }
    }

    fn handle(&mut self, input: Input) {
        match &input {
            Input::Ended(key, how) => {
                let (rank, backbone) = (key.rank, &*key.backbone);
                tracing::info!(rank, backbone, "engine {rank} of {backbone}: {how}");
                self.processes.remove(key);
                self.joined(key, false);
            }
            Input::Notice(key, Notice::Ready(_)) => self.joined(key, true),
            Input::Notice(key, Notice::Failed(_)) => self.joined(key, false),
            Input::Fetched(job, _) => drop(self.fetching.remove(job)),
            _ => {}
        }
        let now = self.began.elapsed().as_millis() as Time;
        for action in self.core.handle(input, now) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(request) => {
                if let Some(outgoing) = &self.outgoing {
                    // A broken line says so by itself.
                    drop(outgoing.send(request));
                }
            }
            Action::Start(key) => self.start(key),
            Action::Tell(key, order) => {
                if let Order::Join(join) = &*order {
                    self.joining(&key, join);
                }
                if let Some(process) = self.processes.get(&key) {
                    process.tell(*order);
                }
            }
            Action::Kill(key) => {
                if let Some(process) = self.processes.get(&key) {
                    process.kill();
                }
            }
            Action::Fetch(job) => self.fetch(*job),
            Action::Forget(job) => {
                if let Some(task) = self.fetching.remove(&job) {
                    task.abort();
                }
            }
            Action::Store { ticket, files, dir, of } => self.store(ticket, files, dir, &of),
            Action::Remove(dir) => {
                let files = self.files.clone();
                tokio::spawn(async move { files.remove(&dir).await });
            }
            Action::Exit => self.exiting = true,
            Action::GiveUp(why) => {
                self.outgoing = None;
                (self.exiting, self.given_up) = (true, Some(why));
            }
        }
    }

    /// An engine is told to join a group: from now on until it is ready, it loads, and meets the other ranks.
    fn joining(&mut self, key: &Key, join: &Join) {
        let epoch = join.assignment.as_ref().map(|assignment| assignment.epoch);
        let (backbone, rank) = (&*key.backbone, key.rank);
        let span =
            tracing::info_span!("start engine", backbone, rank, epoch, otel.status_code = field::Empty);
        self.joining.insert(key.clone(), span);
    }

    fn joined(&mut self, key: &Key, is_ready: bool) {
        let Some(span) = self.joining.remove(key) else { return };
        if !is_ready {
            span.record("otel.status_code", "ERROR");
        }
    }

    fn start(&mut self, key: Key) {
        let input = match Process::start(&self.config, &key, self.engines_sender.clone()) {
            Ok(process) => {
                let started = Input::Started(key.clone(), process.id());
                self.processes.insert(key, process);
                started
            }
            Err(error) => {
                let how = format!("{} cannot be started: {error}", self.config.engine.0.display());
                Input::Ended(key, how)
            }
        };
        let sender = self.done_sender.clone();
        tokio::spawn(async move { sender.send(input).await });
    }

    fn fetch(&mut self, job: v1::JobAssignment) {
        let (files, client, sender) = (self.files.clone(), self.client.subscribe(), self.done_sender.clone());
        let key = (job.job.clone(), job.attempt);
        let span = tracing::info_span!(
            "fetch files",
            job = job.job,
            attempt = job.attempt,
            otel.status_code = field::Empty
        );
        let tell = self.teller(&key, false);
        let of = key.clone();
        let fetched = async move {
            let once = || async {
                let client = connected(client.clone()).await?;
                files.fetch(&client, &job).await
            };
            let fetched = marked(persist(once, tell).await).map_err(Into::into);
            sender.send(Input::Fetched(of, fetched)).await
        };
        let task = tokio::spawn(fetched.instrument(span));
        self.fetching.insert(key, task.abort_handle());
    }

    fn store(&self, ticket: u64, list: Vec<v1::CheckpointFile>, dir: String, of: &v1::JobReport) {
        let (files, client, sender) = (self.files.clone(), self.client.subscribe(), self.done_sender.clone());
        let v1::JobReport { backbone, epoch, job, attempt, .. } = of;
        let span = tracing::info_span!(
            "store checkpoint",
            job,
            attempt,
            backbone,
            epoch,
            otel.status_code = field::Empty
        );
        let tell = self.teller(&(job.clone(), *attempt), true);
        let stored = async move {
            let once = || async {
                let client = connected(client.clone()).await?;
                files.store(&client, &list, &dir).await
            };
            let stored = marked(persist(once, tell).await).map_err(|stopped| stopped.to_string());
            sender.send(Input::Stored(ticket, stored)).await
        };
        tokio::spawn(stored.instrument(span));
    }

    /// Says here and in the job's log that a job's files do not travel, or do again.
    fn teller(&self, job: &FileKey, is_checkpoint: bool) -> impl Fn(Word) + use<> {
        let (job, sender) = (job.clone(), self.done_sender.clone());
        let (fails, works) = if is_checkpoint {
            ("its checkpoint cannot be stored", "its checkpoint is stored")
        } else {
            ("its files cannot be had", "its files are here")
        };
        move |word| {
            let (unsaved, text) = match word {
                Word::Fails(lasts, problem) => {
                    let text =
                        format!("{fails} (tried for {} s by now, and again): {problem}", lasts.as_secs());
                    (is_checkpoint, text)
                }
                Word::Works(lasts) => (false, format!("{works}, after {} s", lasts.as_secs())),
            };
            tracing::warn!("{}: {text}", job.0);
            // Where there is no room, it is said again later.
            drop(sender.try_send(Input::Delayed(job.clone(), Delay { unsaved, text })));
        }
    }
}

/// Notes in the span at work if something failed.
fn marked<T, E>(done: Result<T, E>) -> Result<T, E> {
    if done.is_err() {
        Span::current().record("otel.status_code", "ERROR");
    }
    done
}

/// The connection, as soon as there is one.
async fn connected(mut client: watch::Receiver<Option<Client>>) -> Result<Client, Stopped> {
    let found = client.wait_for(Option::is_some).await.map(|client| client.clone());
    found.ok().flatten().ok_or_else(|| Stopped::Local("the agent is ending".to_owned()))
}

/// The address from which this machine reaches the coordinator. No packet is sent to find it.
fn local_address(endpoint: &str) -> Option<String> {
    let authority = endpoint.split("://").nth(1)?.split('/').next()?;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect(authority).ok()?;
    Some(socket.local_addr().ok()?.ip().to_string())
}

/// The directory for this process alone, until it ends.
fn lock(dir: &Path) -> Result<File, Error> {
    let told = |action| {
        let path = dir.to_owned();
        move |source| Error::StateDir { action, path, source }
    };
    std::fs::create_dir_all(dir).map_err(told("create"))?;
    let file = File::create(dir.join("lock")).map_err(told("write to"))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::InUse(dir.to_owned())),
        // A file system without locks cannot tell us; that is no reason not to work there.
        _ => Ok(file),
    }
}

/// This machine, with these GPUs.
fn machine(gpus: Vec<String>) -> v1::Machine {
    let mut collectives = vec!["local".to_owned()];
    collectives.extend(cfg!(feature = "gloo").then(|| "gloo".to_owned()));
    collectives.extend(cfg!(feature = "cuda").then(|| "nccl".to_owned()));
    v1::Machine {
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        cpu_cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
        memory_bytes: rustix::system::sysinfo().totalram,
        isa: incipit_kernels::isa().name().to_owned(),
        gpus,
        collectives,
    }
}
