//! The frame that every rank sends before an operation, and what ranks must agree on.

use candle_core::DType;

use crate::numbers::MAX_DIMS;
use crate::{Mismatch, Reduce};

/// Bytes that say what the operation is.
pub(crate) const HEADER: usize = 2 * 4 + 3 * 8 + 5 * 4 + MAX_DIMS * 8;
/// Bytes of a payload that travel with them.
pub(crate) const INLINE: usize = 1024;
/// All frames have this length, so that ranks which do not agree can still read each other.
pub(crate) const FRAME: usize = HEADER + INLINE;

const MAGIC: u32 = u32::from_le_bytes(*b"INCP");
/// To be raised with every change to frames, or to what follows them.
const VERSION: u32 = 2;

/// What is asked of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// The first of all: are these the same groups?
    Meet,
    Sum,
    Max,
    AllGather,
    Broadcast,
    Barrier,
}

impl Operation {
    const ALL: [Self; 6] =
        [Self::Meet, Self::Sum, Self::Max, Self::AllGather, Self::Broadcast, Self::Barrier];

    pub(crate) fn of(reduce: Reduce) -> Self {
        match reduce {
            Reduce::Sum => Self::Sum,
            Reduce::Max => Self::Max,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Meet => "the first meeting",
            Self::Sum => "all-reduce (sum)",
            Self::Max => "all-reduce (max)",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }
}

/// What one rank says of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) job: u64,
    pub(crate) epoch: u64,
    pub(crate) sequence: u64,
    pub(crate) operation: Operation,
    pub(crate) root: u32,
    /// Whether the numbers stay on the ranks' devices; otherwise they pass through main memory.
    pub(crate) on_device: bool,
    pub(crate) dtype: DType,
    pub(crate) dims: Vec<usize>,
}

/// FNV-1a with 64 bits (Fowler, Noll and Vo): enough to tell jobs apart that meet by mistake.
pub(crate) fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

const DTYPES: [DType; 4] = [DType::F32, DType::BF16, DType::I64, DType::U8];

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

impl Header {
    /// The frame: the header, then `payload`, then zeros. A longer payload is left out, for it follows in a message of
    /// its own.
    pub(crate) fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(FRAME);
        frame.extend(MAGIC.to_le_bytes());
        frame.extend(VERSION.to_le_bytes());
        for word in [self.job, self.epoch, self.sequence] {
            frame.extend(word.to_le_bytes());
        }
        let operation = Operation::ALL.iter().position(|o| *o == self.operation).unwrap_or_default();
        let dtype = DTYPES.iter().position(|d| *d == self.dtype).unwrap_or_default();
        for word in [operation as u32, self.root, dtype as u32, self.dims.len() as u32, self.on_device.into()]
        {
            frame.extend(word.to_le_bytes());
        }
        for i in 0..MAX_DIMS {
            frame.extend((self.dims.get(i).copied().unwrap_or_default() as u64).to_le_bytes());
        }
        debug_assert_eq!(frame.len(), HEADER);
        if payload.len() <= INLINE {
            frame.extend(payload);
        }
        frame.resize(FRAME, 0);
        frame
    }

    /// The header of a frame; none if this program did not write it.
    pub(crate) fn read(frame: &[u8]) -> Option<Self> {
        let mut reader = Reader(frame.get(..HEADER)?);
        if (reader.u32()?, reader.u32()?) != (MAGIC, VERSION) {
            return None;
        }
        let (job, epoch, sequence) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let operation = *Operation::ALL.get(reader.u32()? as usize)?;
        let root = reader.u32()?;
        let dtype = *DTYPES.get(reader.u32()? as usize)?;
        let len = reader.u32()? as usize;
        let on_device = match reader.u32()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        if len > MAX_DIMS {
            return None;
        }
        let dims = (0..len).map(|_| reader.u64().map(|d| d as usize)).collect::<Option<_>>()?;
        Some(Self { job, epoch, sequence, operation, root, on_device, dtype, dims })
    }

    fn memory(&self) -> &'static str {
        if self.on_device { "on its GPU" } else { "in main memory" }
    }

    fn describe(&self) -> String {
        format!("{} of {} {:?}", self.operation.name(), self.dtype.as_str(), self.dims)
    }
}

type Differs = fn(&Header, &Header) -> bool;

/// In what the ranks of a group differ, seen the same way from each of them: the first difference, in order of
/// importance, of the first rank that differs from the group's first. `members` are the ranks' numbers in the world.
pub(crate) fn disagreement(headers: &[Option<Header>], members: &[usize]) -> Option<(Mismatch, String)> {
    let unreadable = headers.iter().position(Option::is_none);
    if let Some(i) = unreadable {
        let what = format!(
            "what rank {} sends cannot be read; start all ranks with the same build of this program",
            members[i]
        );
        return Some((Mismatch::Protocol, what));
    }
    let headers: Vec<_> = headers.iter().flatten().collect();
    let (first, rest) = headers.split_first()?;
    let differences: [(Mismatch, Differs); 7] = [
        (Mismatch::Job, |a, b| a.job != b.job),
        (Mismatch::Epoch, |a, b| a.epoch != b.epoch),
        (Mismatch::Order, |a, b| (a.sequence, a.operation) != (b.sequence, b.operation)),
        (Mismatch::Root, |a, b| a.root != b.root),
        (Mismatch::Device, |a, b| a.on_device != b.on_device),
        (Mismatch::DType, |a, b| a.dtype != b.dtype),
        (Mismatch::Shape, |a, b| a.dims != b.dims),
    ];
    for (kind, differs) in differences {
        if let Some(i) = rest.iter().position(|other| differs(first, other)) {
            return Some((kind, sentence(kind, (members[0], first), (members[i + 1], rest[i]))));
        }
    }
    None
}

fn sentence(kind: Mismatch, (a, first): (usize, &Header), (b, other): (usize, &Header)) -> String {
    match kind {
        Mismatch::Protocol | Mismatch::Mesh | Mismatch::Job => {
            format!("ranks {a} and {b} belong to different jobs; give each job a store of its own")
        }
        Mismatch::Epoch => format!(
            "rank {a} is of epoch {} and rank {b} of epoch {}; the older one has been replaced and must end",
            first.epoch, other.epoch
        ),
        Mismatch::Order => format!(
            "rank {a} calls {} as its operation {} and rank {b} {} as its operation {}; every rank must make the same \
             calls in the same order",
            first.operation.name(),
            first.sequence,
            other.operation.name(),
            other.sequence
        ),
        Mismatch::Root => format!(
            "rank {a} names root {} and rank {b} root {}; every rank must name the same",
            first.root, other.root
        ),
        Mismatch::Device => format!(
            "rank {a} gives a tensor {} and rank {b} one {}; every rank must keep it at the same kind of place",
            first.memory(),
            other.memory()
        ),
        Mismatch::DType | Mismatch::Shape => format!(
            "rank {a} calls {} and rank {b} {}; every rank must give the same type and shape",
            first.describe(),
            other.describe()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            job: hash("a job"),
            epoch: 3,
            sequence: 1 << 40,
            operation: Operation::Broadcast,
            root: 7,
            on_device: true,
            dtype: DType::I64,
            dims: vec![2, 0, 5_000_000_000],
        }
    }

    #[test]
    fn frames_come_back_as_they_were() {
        let frame = header().frame(b"payload");
        assert_eq!(frame.len(), FRAME);
        assert_eq!(Header::read(&frame), Some(header()));
        assert_eq!(&frame[HEADER..HEADER + 8], b"payload\0");
        assert_eq!(Header::read(&header().frame(&[1; INLINE + 1])), Some(header()));
    }

    #[test]
    fn a_frame_of_something_else_is_not_read() {
        let frame = header().frame(&[]);
        // Magic, version, operation, dtype, number of dims and place.
        for at in [0, 4, 32, 40, 44, 48] {
            let mut bad = frame.clone();
            bad[at] = 0xee;
            assert_eq!(Header::read(&bad), None, "byte {at}");
        }
        assert_eq!(Header::read(&frame[..HEADER - 1]), None);
        let (kind, what) = disagreement(&[Some(header()), None], &[0, 4]).unwrap();
        assert_eq!(kind, Mismatch::Protocol);
        assert!(what.contains("what rank 4 sends cannot be read"), "{what}");
    }

    #[test]
    fn ranks_that_agree_have_nothing_to_report() {
        assert_eq!(disagreement(&[Some(header()), Some(header())], &[0, 1]), None);
    }

    #[test]
    fn the_weightiest_difference_is_reported() {
        let other = Header { epoch: 4, dims: vec![], ..header() };
        let (kind, _) = disagreement(&[Some(header()), Some(header()), Some(other)], &[0, 1, 2]).unwrap();
        assert_eq!(kind, Mismatch::Epoch);
    }
}
