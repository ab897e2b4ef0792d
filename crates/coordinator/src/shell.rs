//! The thread that owns the core and the store: inputs come in over a queue, in batches; what they change is written in one
//! transaction; and only then does anybody hear of it.
//!
//! A commit that fails ends the thread, and with it the process: what the core holds is then ahead of the disk, and a restart is the
//! one way back to what is true.

use std::{
    collections::HashMap,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use incipit_proto::Problem;
use tokio::sync::{mpsc, oneshot};
use tonic::Code;

use crate::{
    core::{
        Core,
        effects::{Change, Effects, Reply, Send as CoreSend},
        input::{Hello, Input},
        time::Time,
    },
    store::{self, Store},
    telemetry::Telemetry,
};

mod outbox;
mod topics;

pub use outbox::Outbox;
pub use topics::Topics;

/// Inputs that wait, at most; then whoever brings one waits.
const QUEUE: usize = 1024;

/// Inputs of one transaction, at most.
const BATCH: usize = 256;

/// How often the core is told that time goes on.
const TICK: Duration = Duration::from_millis(100);

/// Someone who looks at the core.
type Look = Box<dyn FnOnce(&Core, Time) + Send>;

/// Who waits for an answer.
type Caller = oneshot::Sender<Answer>;
type Answer = Result<Reply, Problem>;

enum Command {
    Input(Input, Option<Caller>),
    Connect(Hello, u64, Arc<Outbox>),
    Read(Look),
    Stop,
}

/// The way to the core. Clones share it.
#[derive(Clone, Debug)]
pub struct Handle {
    queue: mpsc::Sender<Command>,
    topics: Arc<Topics>,
}

impl Handle {
    /// Has something handled, and waits for the answer, which comes when what it changed is on the disk.
    ///
    /// # Errors
    /// What the core refuses; or `UNAVAILABLE`, if the coordinator ends.
    pub async fn ask(&self, input: Input) -> Result<Reply, Problem> {
        let (sender, receiver) = oneshot::channel();
        self.push(Command::Input(input, Some(sender))).await?;
        receiver.await.map_err(|_| ending())?
    }

    /// Has something handled that nobody waits for.
    ///
    /// # Errors
    /// `UNAVAILABLE`, if the coordinator ends.
    pub async fn tell(&self, input: Input) -> Result<(), Problem> {
        self.push(Command::Input(input, None)).await
    }

    /// Has a connection handled: whatever is sent over it goes to `outbox`, from its welcome on.
    ///
    /// # Errors
    /// `UNAVAILABLE`, if the coordinator ends.
    pub async fn connect(&self, hello: Hello, connection: u64, outbox: Arc<Outbox>) -> Result<(), Problem> {
        self.push(Command::Connect(hello, connection, outbox)).await
    }

    /// Looks at the core, which then holds what is on the disk, and all that was brought before by the same task.
    ///
    /// # Errors
    /// `UNAVAILABLE`, if the coordinator ends.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Core, Time) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        let (sender, receiver) = oneshot::channel();
        let command = Command::Read(Box::new(move |core, now| {
            let _ = sender.send(look(core, now)); // Whoever asked may be gone.
        }));
        self.push(command).await?;
        receiver.await.map_err(|_| ending())
    }

    /// What changes can be waited for.
    #[must_use]
    pub fn topics(&self) -> &Arc<Topics> {
        &self.topics
    }

    /// Ends the thread, once what waits is handled.
    pub async fn stop(&self) {
        let _ = self.push(Command::Stop).await; // It may have ended already.
    }

    async fn push(&self, command: Command) -> Result<(), Problem> {
        self.queue.send(command).await.map_err(|_| ending())
    }
}

fn ending() -> Problem {
    Problem::new(Code::Unavailable, "SHUTTING_DOWN", "the coordinator ends; try again once it is back")
}

/// The end of the thread: `Ok` after [`Handle::stop`], or when nobody has a [`Handle`] any more.
pub type End = oneshot::Receiver<Result<(), store::Error>>;

/// Starts the thread.
///
/// # Errors
/// If the system has no thread.
pub fn start(
    core: Core,
    store: Store,
    clock: Clock,
    telemetry: Arc<Telemetry>,
) -> std::io::Result<(Handle, End)> {
    let (queue, commands) = mpsc::channel(QUEUE);
    let topics = Arc::new(Topics::new(core.rows().revision));
    let handle = Handle { queue, topics: Arc::clone(&topics) };
    let (sender, end) = oneshot::channel();
    let connections = HashMap::new();
    let runner = Runner { core, store, clock, telemetry, topics, connections, commands };
    thread::Builder::new().name("core".to_owned()).spawn(move || {
        let result = runner.run();
        if let Err(error) = &result {
            tracing::error!("cannot go on, as what was decided cannot be written down: {error}");
        }
        let _ = sender.send(result); // Nobody may wait.
    })?;
    tokio::spawn(tick(handle.queue.downgrade()));
    Ok((handle, end))
}

async fn tick(queue: mpsc::WeakSender<Command>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(queue) = queue.upgrade() else { return };
        if let Err(mpsc::error::TrySendError::Closed(_)) = queue.try_send(Command::Input(Input::Tick, None)) {
            return; // A full queue is behind; the next tick makes up for it.
        }
    }
}

/// The system's time at the start, and from then on a clock that never jumps.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: u64,
    since: Instant,
}

impl Clock {
    /// Starts now.
    #[must_use]
    pub fn start() -> Self {
        let start = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { start: millis(start), since: Instant::now() }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Time {
        Time(self.start + millis(self.since.elapsed()))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

struct Runner {
    core: Core,
    store: Store,
    clock: Clock,
    telemetry: Arc<Telemetry>,
    topics: Arc<Topics>,
    connections: HashMap<u64, Arc<Outbox>>,
    commands: mpsc::Receiver<Command>,
}

#[derive(Default)]
struct Batch {
    changes: Vec<Change>,
    sends: Vec<CoreSend>,
    replies: Vec<(Caller, Answer)>,
    reads: Vec<Look>,
    gone: Vec<u64>,
    stop: bool,
}

impl Runner {
    fn run(mut self) -> Result<(), store::Error> {
        while let Some(command) = self.commands.blocking_recv() {
            let mut batch = Batch::default();
            self.handle(command, &mut batch);
            for _ in 1..BATCH {
                let Ok(command) = self.commands.try_recv() else { break };
                self.handle(command, &mut batch);
            }
            if self.finish(batch)? {
                break;
            }
        }
        Ok(())
    }

    fn handle(&mut self, command: Command, batch: &mut Batch) {
        let (input, caller) = match command {
            Command::Input(input, caller) => (input, caller),
            Command::Connect(hello, connection, outbox) => {
                self.connections.insert(connection, outbox);
                (Input::Connected { connection, hello }, None)
            }
            Command::Read(read) => return batch.reads.push(read),
            Command::Stop => {
                batch.stop = true;
                return;
            }
        };
        if let Input::Disconnected { connection, .. } = &input {
            batch.gone.push(*connection);
        }
        let Effects { changes, sends, reply } = self.core.handle(input, self.clock.now());
        batch.changes.extend(changes);
        batch.sends.extend(sends);
        if let Some(caller) = caller {
            let nothing =
                || Err(Problem::new(Code::Internal, "NO_REPLY", "the coordinator has no answer to this"));
            batch.replies.push((caller, reply.unwrap_or_else(nothing)));
        }
    }

    /// Writes what a batch changed, and then lets it be known. Says whether this was the last one.
    fn finish(&mut self, batch: Batch) -> Result<bool, store::Error> {
        if !batch.changes.is_empty() {
            let start = Instant::now();
            self.store.commit(&batch.changes)?;
            self.telemetry.committed(&batch.changes, start.elapsed());
            self.topics.publish(&batch.changes);
        }
        for send in batch.sends {
            // The connection may be gone; then the worker is told everything when it is back.
            if let Some(outbox) = self.connections.get(&send.connection) {
                outbox.push(send.message);
            }
        }
        for connection in batch.gone {
            self.connections.remove(&connection);
        }
        for (caller, reply) in batch.replies {
            let _ = caller.send(reply); // Whoever asked may be gone.
        }
        for read in batch.reads {
            read(&self.core, self.clock.now());
        }
        Ok(batch.stop)
    }
}
