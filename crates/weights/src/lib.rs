//! The files of a frozen backbone: its weights, whatever container they come in, their fingerprint, and its tokenizer.
//!
//! * [`Checkpoint`] reads a model directory (safetensors or PyTorch `.bin`, single or sharded) without copying what need not
//!   be copied; [`Random`] makes weights up. Both are a [`Source`].
//! * [`Fingerprint`] names the numbers of a backbone, so that a prompt is never continued on another one.
//! * [`resolve`] turns a directory or a Hugging Face Hub id into a directory; [`load_tokenizer`] reads the tokenizer in it.
//! * [`write_safetensors`] rewrites weights, tensor by tensor, into a directory that appears whole or not at all.

mod checkpoint;
mod error;
mod fingerprint;
mod hub;
mod layout;
mod mapped;
mod random;
mod readers;
mod source;
mod spiece;
mod tokenizer;
mod write;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use hub::resolve;
pub use random::{Random, RandomTensor};
pub use source::{Source, TensorInfo};
pub use tokenizer::load_tokenizer;
pub use write::{Written, write_safetensors};
