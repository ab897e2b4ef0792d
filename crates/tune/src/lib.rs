//! Prompt tuning: optimizers, schedules, recipes, the step engine, evaluation, checkpoints and their files.

pub mod atomic;
pub mod backbone;
pub mod checkpoint;
mod choice;
pub mod control;
pub mod device;
pub mod engine;
mod error;
pub mod evaluate;
pub mod events;
pub mod init;
pub mod job;
pub mod log;
mod microbatch;
pub mod npy;
pub mod optimizer;
mod order;
pub mod peft;
pub mod prompt;
pub mod ranks;
pub mod recipe;
mod run_dir;
pub mod schedule;
pub mod spec;
pub mod task;
pub mod tenant;
mod tensors;
pub mod train;

pub use error::{Error, Result};
