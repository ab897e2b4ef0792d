//! What NCCL and a GPU have to provide: the border between the protocol, which can be tested anywhere, and them.

use std::fmt::Debug;

use candle_core::Tensor;

/// Which way bytes go between the ranks of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Everybody's to everybody.
    Gather,
    /// As many equal pieces as there are ranks, one for each.
    Exchange,
    /// One rank's to everybody.
    From(usize),
}

/// What is done with everybody's tensor where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The sum, in an order of NCCL's own.
    Sum,
    /// As many equal pieces as there are ranks, along the first dim: those that are this rank's, by rank.
    Exchange,
    /// The largest; NaN is passed over.
    Max,
    /// One after the other, along the first dim.
    Gather,
    /// One rank's.
    From(usize),
}

/// Why NCCL or the device did not do what they were asked. After any of them the communicator is of no more use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another rank, or the way to it.
    Peer(String),
    /// This rank's device, driver or library.
    Here(String),
}

/// One rank's communicator of a group, and the queue of its device that it works in. Nothing here waits for another rank
/// but [`finish`](Self::finish) and, if NCCL fails in that too, [`abort`](Self::abort).
///
/// An operation is begun ([`post`](Self::post), [`run`](Self::run)); NCCL may then still be busy putting it into the queue,
/// which it tells through [`settled`](Self::settled); then it is sealed: what follows it is put into the queue. Between
/// begin and seal no other call is made that begins or seals.
pub(crate) trait Lane: Send + Sync + Debug + Sized + 'static {
    /// Bytes on their way. To drop one before it has arrived frees memory that is still written to.
    type Parcel: Send;
    /// A tensor on its way. To drop one before it is sealed frees memory that is still written to.
    type Run: Send;

    /// Whether `x` lies where this lane works.
    fn owns(&self, x: &Tensor) -> bool;

    /// Where this lane works, in words.
    fn place(&self) -> String;

    /// Sends bytes from main memory.
    fn post(&self, route: Route, mine: &[u8]) -> Result<Self::Parcel, Fault>;

    /// Begins an operation on a tensor of this lane's device, behind what the device has to do for it.
    fn run(&self, step: Step, x: &Tensor) -> Result<Self::Run, Fault>;

    /// Whether what was begun is in the queue, and all is well with the communicator.
    fn settled(&self) -> Result<bool, Fault>;

    /// Lets the bytes return to main memory.
    fn seal(&self, parcel: &mut Self::Parcel) -> Result<(), Fault>;

    /// Lets what the device does next wait for the tensor, and returns it.
    fn seal_run(&self, run: &mut Self::Run) -> Result<Tensor, Fault>;

    /// Whether the bytes are here.
    fn has_arrived(&self, parcel: &Self::Parcel) -> Result<bool, Fault>;

    /// The bytes that are here: those of all ranks, or of the root.
    fn open(&self, parcel: Self::Parcel) -> Vec<u8>;

    /// Whether the device has done all that comes before the operation.
    fn is_due(&self, run: &Self::Run) -> Result<bool, Fault>;

    /// Whether the tensor is done.
    fn is_over(&self, run: &Self::Run) -> Result<bool, Fault>;

    /// Ends everything that is in the queue, undone. No other call is under way, and none will come.
    fn abort(&self);

    /// Ends when everything in the queue is done and has reached the other ranks. No other call is under way, and none
    /// will come.
    fn finish(&self) -> Result<(), Fault>;
}

/// Makes lanes.
pub(crate) trait Opener {
    type Lane: Lane;

    /// What the first rank of a group tells the others, so that they find each other.
    fn id(&self) -> Result<Vec<u8>, Fault>;

    /// Begins to connect a group; it is connected when the lane has [settled](Lane::settled).
    fn open(&self, id: &[u8], rank: usize, size: usize) -> Result<Self::Lane, Fault>;
}
