//! A frozen T5 (Raffel et al. 2020) as a function of soft prompts (Lester et al. 2021): losses, prompt gradients, generation.
//!
//! The backward pass is written out layer by layer: what is frozen has no gradient, and what is kept for backward is what
//! [`layers`](self) say. Methods that train weights, the model's own or small ones within it, ask for those gradients by name
//! ([`WeightGradients`]). The crate does no input or output.

mod absorbed;
mod adapter;
mod axis;
mod batch;
mod beam;
mod config;
mod decoder;
mod encoder;
mod error;
mod feed_forward;
mod generate;
mod gradients;
mod layers;
mod prefix;
mod prompt;
pub mod sharding;
mod t5;

pub use axis::TensorAxis;
pub use batch::{Example, Microbatch};
pub use config::Config;
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Generated};
pub use gradients::WeightGradients;
pub use prompt::{Placement, SoftPrompt};
pub use t5::{Encoded, ExampleGradient, PassOptions, T5, embedding_name};
