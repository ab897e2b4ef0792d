//! An engine: a process that holds one rank's part of a backbone, or with ranks as threads all of it, for as long as its agent lives.
//!
//! It is told by its agent which model to load and which group of ranks to join, and, if it leads, which jobs to train. What it
//! measures and saves it tells the agent. Nothing of it outlives it: a job goes on elsewhere from its last checkpoint.

mod failure;
mod group;
mod lead;
mod load;
mod machine;
mod parts;
mod plan;
mod points;
mod rendezvous;
mod resident;
mod residents;
mod saver;
mod share;
mod voice;
mod watch;

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use incipit_proto::v1::EngineLossCause;

use crate::engine::group::Group;
use crate::engine::load::Loaded;
use crate::engine::parts::Parts;
use crate::engine::rendezvous::Answers;
use crate::engine::voice::Voice;
use crate::engine::watch::{Farewell, Watches};
use crate::frames::{Join, Notice, Order};

/// What comes to the engine's main thread.
#[expect(clippy::large_enum_variant, reason = "few are on their way at once")]
pub(crate) enum Mail {
    /// From the agent.
    Order(Order),
    /// From a thread that loads data.
    Loaded(Box<Loaded>),
}

/// Where it comes. One thread at a time reads it: the leader of a group, or between two groups the main thread.
pub(crate) type Inbox = Mutex<Receiver<Mail>>;

/// What comes after a group of ranks.
pub(crate) enum Next {
    /// Another one.
    Join(Box<Join>),
    /// Nothing: the agent is gone, or a device has failed.
    End,
}

/// Runs an engine that hears its agent on `input` and answers on `output`, until the agent is gone or its device has failed. A pass through the
/// backbone may take `hang_after` in any case; where none is given, a while that suits the device.
pub fn run(
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
    hang_after: Option<Duration>,
) {
    let voice = Voice::new(output);
    let watches = Watches::start(voice.clone());
    let answers = Arc::<Answers>::default();
    let (sender, inbox) = channel();
    voice::listen(input, sender.clone(), answers.clone(), watches.clone());
    let inbox = Mutex::new(inbox);
    let mut parts = Parts::default();
    let mut next = await_join(&inbox);
    while let Next::Join(join) = next {
        let epoch = join.assignment.as_ref().map_or(0, |assignment| assignment.epoch);
        voice.say(Notice::Joining(epoch));
        let farewell = Arc::new(Farewell::new(voice.clone(), epoch));
        let (join, answers, loaded, watches) = (&*join, &answers, &sender, &watches);
        let group = Group { join, voice: &voice, answers, loaded, watches, hang_after, farewell };
        next = match group.stay(&mut parts, &inbox) {
            Ok(next) => next,
            Err(loss) => {
                group.farewell.say(&loss);
                if loss.0 == EngineLossCause::Exited { Next::End } else { await_join(&inbox) }
            }
        };
    }
}

/// Waits for the next group; whatever else comes belongs to one that is gone.
fn await_join(inbox: &Inbox) -> Next {
    let inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
    for mail in &*inbox {
        if let Mail::Order(Order::Join(join)) = mail {
            return Next::Join(Box::new(join));
        }
    }
    Next::End
}

/// The last group that has come meanwhile, if one has; whatever else has come belongs to one that is gone.
pub(crate) fn newest_join(inbox: &Inbox) -> Option<Next> {
    let inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
    let join = |mail| if let Mail::Order(Order::Join(join)) = mail { Some(join) } else { None };
    inbox.try_iter().filter_map(join).last().map(|join| Next::Join(Box::new(join)))
}

/// Why a group came to its end.
pub(crate) type Loss = (EngineLossCause, String);
