//! The files of a frozen backbone: its weights, whatever container they come in, their fingerprint, and its tokenizer.
//!
//! * [`Checkpoint`] reads a model directory (safetensors or PyTorch `.bin`, single or sharded) without copying what need not
//!   be copied; [`Random`] makes weights up. Both are a [`Source`], and so is an [`Overlay`] of trained tensors over one of them.
//! * [`Source::part`] gives a rank of a tensor-parallel replica its slice of a tensor, and reads nothing else.
//! * [`Fingerprint`] names the numbers of a backbone, so that a prompt is never continued on another one. Ranks can share the
//!   hashing and put their [`Digests`] together.
//! * [`resolve`] turns a directory or a Hugging Face Hub id into a directory; [`load_tokenizer`] reads the tokenizer in it.
//! * [`write_safetensors`] rewrites weights, tensor by tensor, into a directory that appears whole or not at all.

mod checkpoint;
mod digests;
mod error;
mod fingerprint;
mod hub;
mod layout;
mod loading;
mod mapped;
mod overlay;
mod random;
mod readers;
mod reads;
mod slice;
mod source;
mod spiece;
mod tokenizer;
mod write;

pub use checkpoint::Checkpoint;
pub use digests::Digests;
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use hub::{resolve, resolve_config, resolve_watched, split_revision};
pub use loading::Loading;
pub use overlay::Overlay;
pub use random::{Random, RandomTensor};
pub use source::{Source, TensorInfo};
pub use tokenizer::load_tokenizer;
pub use write::{Written, write_safetensors};
