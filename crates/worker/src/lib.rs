//! A worker: the agent of a machine, and the engine processes that hold backbones.
//!
//! The agent dials the coordinator and runs the engines that it is told to run. An engine holds a rank's part of a backbone and, if
//! it leads, trains the jobs that it is given, many in one batch. An engine dies with its agent; a job goes on from its last checkpoint.

pub mod agent;
mod clock;
pub mod engine;
pub mod frames;
pub mod spec;
