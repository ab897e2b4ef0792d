//! TensorBoard's event files: `events.out.tfevents.*`.
//!
//! A file is a sequence of records, each a length, the masked CRC-32C of the length, a protobuf `Event` and
//! its masked CRC-32C. The messages are those of TensorFlow's `event.proto` and `summary.proto`, as far as
//! scalars need them.

use crate::{Error, Result};
use prost::Message;
use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// What a TensorBoard record says.
#[derive(Clone, PartialEq, Message)]
struct EventMessage {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    // Always written: a field of a oneof is not left out when it is 0.
    #[prost(oneof = "Number", tags = "2")]
    number: Option<Number>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Number {
    #[prost(float, tag = "2")]
    Simple(f32),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.SessionStatus.START`.
const SESSION_START: i32 = 1;

/// Writes the scalars of one run for TensorBoard.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a new event file in `dir`. Give `first_step` where a run is resumed: TensorBoard then forgets
    /// what earlier files say about that step and later ones.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn create(dir: &Path, first_step: u64, now: SystemTime) -> Result<Self> {
        let (path, file) = new_file(dir, now)?;
        let mut writer = Self { path, file };
        writer.write(0, now, What::FileVersion("brain.Event:2".to_owned()))?;
        writer.write(first_step, now, What::SessionLog(SessionLog { status: SESSION_START }))?;
        Ok(writer)
    }

    /// Writes one event: the value of each tag at `step`.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn scalars(&mut self, step: u64, now: SystemTime, values: &[(&str, f32)]) -> Result<()> {
        let value = |(tag, value): &(&str, f32)| SummaryValue {
            tag: (*tag).to_owned(),
            number: Some(Number::Simple(*value)),
        };
        self.write(step, now, What::Summary(Summary { values: values.iter().map(value).collect() }))
    }

    /// Where it writes.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Each record goes out by one call, so that a process that dies leaves at most the last one incomplete,
    /// which readers skip.
    fn write(&mut self, step: u64, now: SystemTime, what: What) -> Result<()> {
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let event = EventMessage { wall_time: seconds(now).as_secs_f64(), step, what: Some(what) };
        self.file.write_all(&record(&event.encode_to_vec())).map_err(Error::io("write", &self.path))
    }
}

/// A file of a name that no other has: TensorBoard reads those of a directory in the order of their names.
fn new_file(dir: &Path, now: SystemTime) -> Result<(PathBuf, File)> {
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy().replace(['/', '\0'], "-");
    for number in 0u64.. {
        let name = format!(
            "events.out.tfevents.{:010}.{host}.{}.{number}",
            seconds(now).as_secs(),
            std::process::id()
        );
        let path = dir.join(name);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io("create", path)(e)),
        }
    }
    unreachable!("the loop ends by returning")
}

fn seconds(time: SystemTime) -> std::time::Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn record(data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(len);
    record.extend(masked_crc(&len).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

/// As TensorFlow's `record_writer` stores it, so that the checksum of data that holds checksums stays
/// telling.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: f64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs_f64(seconds)
    }

    /// Reads records as the format says, not by the writer's own functions.
    fn events(mut bytes: &[u8]) -> Vec<EventMessage> {
        let crc = |data: &[u8], stored: &[u8]| {
            let crc = crc32c::crc32c(data);
            let masked = crc.rotate_left(17).wrapping_add(0xa282_ead8);
            assert_eq!(masked.to_le_bytes(), stored);
        };
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at(12);
            crc(&head[..8], &head[8..]);
            let (data, rest) = rest.split_at(u64::from_le_bytes(head[..8].try_into().unwrap()) as usize);
            crc(data, &rest[..4]);
            events.push(EventMessage::decode(data).unwrap());
            bytes = &rest[4..];
        }
        events
    }

    #[test]
    fn scalars_are_written_as_records_of_tensorflows_events() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 5, at(1.7e9)).unwrap();
        writer.scalars(6, at(1.7e9 + 0.5), &[("train/loss", 0.25), ("train/lr", 0.0)]).unwrap();
        let events = events(&std::fs::read(writer.path()).unwrap());
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".to_owned())));
        assert_eq!((events[1].step, &events[1].what), (5, &Some(What::SessionLog(SessionLog { status: 1 }))));
        let Some(What::Summary(summary)) = &events[2].what else { panic!("{events:?}") };
        let read: Vec<_> = summary.values.iter().map(|v| (&*v.tag, v.number.clone().unwrap())).collect();
        assert_eq!(read, [("train/loss", Number::Simple(0.25)), ("train/lr", Number::Simple(0.0))]);
        assert_eq!((events[2].step, events[2].wall_time), (6, 1.7e9 + 0.5));
        assert_eq!(events.len(), 3);
    }

    /// From TensorFlow: the record that begins every file it writes at time 0.
    #[test]
    fn the_bytes_of_an_event_are_protobufs() {
        let what = Some(What::FileVersion("brain.Event:2".to_owned()));
        let event = EventMessage { wall_time: 1.0, step: 0, what };
        let mut expected = vec![0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x1a, 13];
        expected.extend(b"brain.Event:2");
        assert_eq!(event.encode_to_vec(), expected);
    }

    #[test]
    fn files_begun_in_the_same_second_have_names_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<_> =
            (0..3).map(|_| EventWriter::create(dir.path(), 0, at(1e9)).unwrap().path().to_owned()).collect();
        assert!(names.is_sorted() && names[0] != names[1] && names[1] != names[2], "{names:?}");
        assert!(names[0].display().to_string().contains("events.out.tfevents.1000000000."));
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = EventWriter::create(Path::new("/nowhere/out"), 0, at(1.0)).unwrap_err().to_string();
        assert!(error.contains("/nowhere/out"), "{error}");
    }
}
