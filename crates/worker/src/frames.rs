//! What an agent and its engines tell each other, over the engine's standard input and output: frames of a length and a message.
//!
//! Both ends are always the same program, so that this is no wire format that has to last.

use std::io::{self, Read, Write};

use incipit_proto::v1;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Longest frame in bytes.
const MAX_FRAME: usize = 64 << 20;

/// What the agent says.
#[derive(Clone, PartialEq, Message)]
pub struct ToEngine {
    /// What it says.
    #[prost(oneof = "Order", tags = "1, 2, 3")]
    pub order: Option<Order>,
}

/// What the agent says.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Order {
    /// The first one, and again whenever the group has a new epoch.
    #[prost(message, tag = "1")]
    Join(Join),
    /// To the leader: the jobs that it is to have, as far as their files are there.
    #[prost(message, tag = "2")]
    Jobs(Jobs),
    /// The answer to a question of the rendezvous.
    #[prost(message, tag = "3")]
    Rendezvous(v1::RendezvousValue),
}

/// Which part of which model an engine is to hold, and whom it is to meet.
#[derive(Clone, PartialEq, Message)]
pub struct Join {
    /// The backbone.
    #[prost(message, optional, tag = "1")]
    pub assignment: Option<v1::EngineAssignment>,
    /// The rank; with the collective `local` the process has all of them.
    #[prost(uint32, tag = "2")]
    pub rank: u32,
    /// An address of this machine that other ranks can reach; empty if it is not known.
    #[prost(string, tag = "3")]
    pub address: String,
    /// Directory for checkpoints on their way to the coordinator.
    #[prost(string, tag = "4")]
    pub outbox: String,
    /// How many engines are on this machine: they share its processors.
    #[prost(uint32, tag = "5")]
    pub neighbours: u32,
    /// Its number among the engines of this machine: that of its GPU.
    #[prost(uint32, tag = "6")]
    pub local_rank: u32,
}

/// The jobs of a backbone.
#[derive(Clone, PartialEq, Message)]
pub struct Jobs {
    /// Epoch of the group.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// The jobs.
    #[prost(message, repeated, tag = "2")]
    pub jobs: Vec<LocalJob>,
}

/// A job, whose files are on this machine.
#[derive(Clone, PartialEq, Message)]
pub struct LocalJob {
    /// The job.
    #[prost(message, optional, tag = "1")]
    pub assignment: Option<v1::JobAssignment>,
    /// Directory of the checkpoint to go on from, with a directory for each of several tasks; empty where there is none.
    #[prost(string, tag = "2")]
    pub checkpoint: String,
    /// The files of its tasks, in the order of [`crate::spec::tasks`].
    #[prost(message, repeated, tag = "3")]
    pub tasks: Vec<LocalTask>,
}

/// The files of a task on this machine.
#[derive(Clone, PartialEq, Message)]
pub struct LocalTask {
    /// File of training examples.
    #[prost(string, tag = "1")]
    pub train: String,
    /// File of evaluation examples; empty where there is none.
    #[prost(string, tag = "2")]
    pub eval: String,
    /// File of the prompt to start as; empty where there is none.
    #[prost(string, tag = "3")]
    pub initial: String,
}

/// What an engine says.
#[derive(Clone, PartialEq, Message)]
pub struct FromEngine {
    /// What it says.
    #[prost(oneof = "Notice", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10")]
    pub notice: Option<Notice>,
}

/// What an engine says.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Notice {
    /// Plans carried out so far: told twice a second by a thread that besides only looks whether the ranks get on.
    #[prost(uint64, tag = "1")]
    Alive(u64),
    /// It has loaded, and met the others.
    #[prost(message, tag = "2")]
    Ready(Ready),
    /// It cannot go on in this epoch.
    #[prost(message, tag = "3")]
    Failed(Failed),
    /// Something happened to a job.
    #[prost(message, tag = "4")]
    Job(v1::JobReport),
    /// A job saved a checkpoint, whose files lie in a directory.
    #[prost(message, tag = "5")]
    Saved(Saved),
    /// It wrote a line.
    #[prost(message, tag = "6")]
    Log(Log),
    /// For the other ranks of the group.
    #[prost(message, tag = "7")]
    Put(v1::RendezvousPut),
    /// A question for what other ranks have left.
    #[prost(message, tag = "8")]
    Get(v1::RendezvousGet),
    /// It has left every group but that of this epoch, which it joins now, or once it has loaded.
    #[prost(uint64, tag = "9")]
    Joining(u64),
    /// How far it has loaded its parts: told each time that it is another.
    #[prost(message, tag = "10")]
    Loading(Loading),
}

/// How far an engine has loaded its parts of the model.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Loading {
    /// Bytes that are loaded.
    #[prost(uint64, tag = "1")]
    pub loaded: u64,
    /// Bytes of all.
    #[prost(uint64, tag = "2")]
    pub total: u64,
}

/// An engine has loaded.
#[derive(Clone, PartialEq, Message)]
pub struct Ready {
    /// Epoch of the group.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// What it has loaded.
    #[prost(message, optional, tag = "2")]
    pub engine: Option<v1::EngineReady>,
}

/// An engine cannot go on.
#[derive(Clone, PartialEq, Message)]
pub struct Failed {
    /// Epoch of the group.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// The kind of it.
    #[prost(enumeration = "v1::EngineLossCause", tag = "2")]
    pub cause: i32,
    /// One readable line.
    #[prost(string, tag = "3")]
    pub message: String,
}

/// A job saved a checkpoint.
#[derive(Clone, PartialEq, Message)]
pub struct Saved {
    /// For the coordinator.
    #[prost(message, optional, tag = "1")]
    pub report: Option<v1::JobReport>,
    /// Where the files are; the agent removes it when they are stored.
    #[prost(string, tag = "2")]
    pub dir: String,
}

/// A line.
#[derive(Clone, PartialEq, Message)]
pub struct Log {
    /// `jobs/{job}`; empty where it is of the backbone.
    #[prost(string, tag = "1")]
    pub job: String,
    /// The line. Offset, time, worker and rank are not set.
    #[prost(message, optional, tag = "2")]
    pub line: Option<v1::LogLine>,
}

/// Writes a frame.
///
/// # Errors
/// If the other end is gone, or the message is longer than a frame can be.
pub fn write(to: &mut impl Write, message: &impl Message) -> io::Result<()> {
    to.write_all(&encode(message)?)?;
    to.flush()
}

/// A frame's bytes.
///
/// # Errors
/// If the message is longer than a frame can be.
pub fn encode(message: &impl Message) -> io::Result<Vec<u8>> {
    let length = message.encoded_len();
    if length > MAX_FRAME {
        return Err(too_long(length));
    }
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend((length as u32).to_le_bytes());
    message.encode(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// Reads a frame; none at the end.
///
/// # Errors
/// If the other end died within a frame, or what it wrote is none.
pub fn read<M: Message + Default>(from: &mut impl Read) -> io::Result<Option<M>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let mut bytes = vec![0; checked(length)?];
    from.read_exact(&mut bytes)?;
    M::decode(&*bytes).map(Some).map_err(io::Error::other)
}

/// As [`read`], without blocking a thread.
///
/// # Errors
/// As [`read`].
pub async fn receive<M: Message + Default>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<M>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    let mut bytes = vec![0; checked(length)?];
    from.read_exact(&mut bytes).await?;
    M::decode(&*bytes).map(Some).map_err(io::Error::other)
}

fn checked(length: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(length) as usize;
    if length <= MAX_FRAME { Ok(length) } else { Err(too_long(length)) }
}

fn too_long(length: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a frame of {length} bytes is longer than {MAX_FRAME}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alive(progress: u64) -> FromEngine {
        FromEngine { notice: Some(Notice::Alive(progress)) }
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let mut bytes = Vec::new();
        for progress in [0, 7, u64::MAX] {
            write(&mut bytes, &alive(progress)).unwrap();
        }
        let mut from = &*bytes;
        for progress in [0, 7, u64::MAX] {
            assert_eq!(read(&mut from).unwrap(), Some(alive(progress)));
        }
        assert_eq!(read::<FromEngine>(&mut from).unwrap(), None);
    }

    #[test]
    fn what_is_cut_short_or_too_long_is_an_error() {
        let bytes = encode(&alive(300)).unwrap();
        assert!(read::<FromEngine>(&mut &bytes[..bytes.len() - 1]).is_err());
        assert!(read::<FromEngine>(&mut &[0xff; 8][..]).is_err());
        assert!(encode(&Join { outbox: "x".repeat(MAX_FRAME + 1), ..Join::default() }).is_err());
    }
}
