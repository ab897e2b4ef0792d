//! The engine's two ends of the pipe to its agent.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use incipit_proto::v1;

use crate::clock;
use crate::engine::Mail;
use crate::engine::rendezvous::Answers;
use crate::engine::watch::Watches;
use crate::frames::{self, FromEngine, Join, Log, Notice, Order, ToEngine};

/// Speaks to the agent. Clones speak with the same voice, one sentence at a time.
#[derive(Clone)]
pub(crate) struct Voice {
    output: Arc<Mutex<Box<dyn Write + Send>>>,
    progress: Arc<AtomicU64>,
}

impl Voice {
    /// A voice that writes to `output`.
    pub(crate) fn new(output: impl Write + Send + 'static) -> Self {
        Self { output: Arc::new(Mutex::new(Box::new(output))), progress: Arc::default() }
    }

    /// Says that the process is alive, and how far it is.
    pub(crate) fn alive(&self) {
        self.say(Notice::Alive(self.progress.load(Ordering::Relaxed)));
    }

    /// Says something. An agent that is gone takes this process with it: nobody else could use what it has.
    pub(crate) fn say(&self, notice: Notice) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = frames::write(&mut *output, &FromEngine { notice: Some(notice) }) {
            tracing::error!("the agent is gone ({error})");
            std::process::exit(1);
        }
    }

    /// Writes a line into the log of a job (`jobs/{job}`), or with an empty name of the backbone.
    pub(crate) fn log(&self, job: &str, level: &str, text: String) {
        let (time, level) = (Some(clock::now()), level.to_owned());
        let line = v1::LogLine { time, level, text, ..v1::LogLine::default() };
        self.say(Notice::Log(Log { job: job.to_owned(), line: Some(line) }));
    }

    /// A plan was carried out.
    pub(crate) fn advance(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads what the agent says for as long as it lives, on a thread of its own. Answers of the rendezvous go to those who wait for
/// them, all else to `inbox`; a new group ends waiting in the old one. When the agent is gone, so is this process.
pub(crate) fn listen(
    mut input: impl Read + Send + 'static,
    inbox: Sender<Mail>,
    answers: Arc<Answers>,
    watches: Watches,
) {
    std::thread::spawn(move || {
        loop {
            match frames::read::<ToEngine>(&mut input) {
                Ok(Some(ToEngine { order: Some(Order::Rendezvous(value)) })) => answers.put(value),
                Ok(Some(ToEngine { order: Some(order) })) => {
                    if let Order::Join(Join { assignment: Some(assignment), .. }) = &order {
                        answers.begin(assignment.epoch);
                        watches.begin(assignment.epoch);
                    }
                    if inbox.send(Mail::Order(order)).is_err() {
                        return;
                    }
                }
                Ok(Some(ToEngine { order: None })) => {}
                Ok(None) => std::process::exit(0),
                Err(error) => {
                    tracing::error!("cannot read from the agent ({error})");
                    std::process::exit(1);
                }
            }
        }
    });
}

#[cfg(test)]
pub(crate) mod pipe {
    //! An agent's end of the pipe.

    use std::io;
    use std::sync::{Arc, Mutex};

    use crate::frames::{self, FromEngine, Notice};

    /// Keeps what a voice says.
    #[derive(Clone, Default)]
    pub(crate) struct Pipe(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Pipe {
        /// What was said since the last call.
        pub(crate) fn said(&self) -> Vec<Notice> {
            let bytes = std::mem::take(&mut *self.0.lock().unwrap());
            let (mut bytes, mut said) = (&*bytes, Vec::new());
            while let Ok(Some(FromEngine { notice: Some(notice) })) = frames::read(&mut bytes) {
                said.push(notice);
            }
            said
        }
    }
}
