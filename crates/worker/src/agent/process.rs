//! Engines as child processes: each a process group of its own, which dies with the agent.

use std::process::Stdio;

use incipit_proto::v1::LogLine;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc::{Sender, UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::agent::core::Input;
use crate::agent::{AgentConfig, Key};
use crate::clock;
use crate::frames::{self, FromEngine, Order, ToEngine};

/// Longest line of an engine's standard error that is kept, in bytes.
const LINE: usize = 8 << 10;

/// A running engine.
pub(crate) struct Process {
    orders: UnboundedSender<Vec<u8>>,
    group: Option<Pid>,
}

impl Process {
    /// Starts an engine, whose notices, lines and end go to `inputs`.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn start(config: &AgentConfig, key: &Key, inputs: Sender<Input>) -> std::io::Result<Self> {
        let (program, arguments) = &config.engine;
        let mut command = Command::new(program);
        // It asks the system to die with this process; the end of its input tells it the same.
        command.args(arguments).arg("--parent").arg(std::process::id().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        let mut child = command.spawn()?;
        let group = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        let (orders, queue) = unbounded_channel();
        if let Some(stdin) = child.stdin.take() {
            tokio::spawn(write(stdin, queue));
        }
        tokio::spawn(watch(child, key.clone(), inputs));
        Ok(Self { orders, group })
    }

    /// The number of the process; 0 of one that has ended already.
    pub(crate) fn id(&self) -> u32 {
        self.group.map_or(0, |group| group.as_raw_nonzero().get().unsigned_abs())
    }

    /// Says something to the engine. One that is gone does not hear it.
    pub(crate) fn tell(&self, order: Order) {
        if let Ok(bytes) = frames::encode(&ToEngine { order: Some(order) }) {
            let _ = self.orders.send(bytes);
        }
    }

    /// Kills it, and whatever it has started.
    pub(crate) fn kill(&self) {
        if let Some(group) = self.group {
            // It may have ended meanwhile.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn write(mut stdin: ChildStdin, mut queue: UnboundedReceiver<Vec<u8>>) {
    while let Some(bytes) = queue.recv().await {
        if stdin.write_all(&bytes).await.is_err() {
            // The end of the process is told by whoever watches it.
            return;
        }
    }
}

/// Listens to an engine until its end.
async fn watch(mut child: Child, key: Key, inputs: Sender<Input>) {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let notices = async {
        let Some(mut stdout) = stdout else { return };
        while let Ok(Some(FromEngine { notice: Some(notice) })) = frames::receive(&mut stdout).await {
            if inputs.send(Input::Notice(key.clone(), notice)).await.is_err() {
                return;
            }
        }
    };
    let lines = async {
        let Some(stderr) = stderr else { return };
        lines(stderr, &key, &inputs).await;
    };
    tokio::join!(notices, lines);
    let id = child.id().unwrap_or_default();
    let how = match child.wait().await {
        Ok(status) => format!("process {id}: {status}"),
        Err(error) => format!("process {id} cannot be waited for: {error}"),
    };
    let _ = inputs.send(Input::Ended(key, how)).await;
}

async fn lines(stderr: impl AsyncRead + Unpin, key: &Key, inputs: &Sender<Input>) {
    let mut reader = BufReader::new(stderr);
    let mut bytes = Vec::new();
    while let Ok(1..) = reader.read_until(b'\n', &mut bytes).await {
        bytes.truncate(LINE);
        let line = line(&String::from_utf8_lossy(&bytes));
        bytes.clear();
        if !line.text.is_empty() && inputs.send(Input::Line(key.clone(), line)).await.is_err() {
            return;
        }
    }
}

/// A line of standard error. Those of `tracing` begin with their level.
fn line(text: &str) -> LogLine {
    let text = text.trim();
    let (first, rest) = text.split_once(' ').unwrap_or((text, ""));
    let (level, text) =
        if ["ERROR", "WARN", "INFO", "DEBUG"].contains(&first) { (first, rest) } else { ("", text) };
    LogLine { time: Some(clock::now()), level: level.to_owned(), text: text.to_owned(), ..LogLine::default() }
}
