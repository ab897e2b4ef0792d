//! The commands, one module each: their flags, and what they do.

pub(crate) mod backbone;
pub(crate) mod backbones;
pub(crate) mod bench;
pub(crate) mod checkpoint;
pub(crate) mod convert;
pub(crate) mod coordinator;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod engine;
pub(crate) mod ensemble;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod group;
pub(crate) mod inspect;
pub(crate) mod job;
pub(crate) mod launch;
pub(crate) mod multitask;
pub(crate) mod paper;
pub(crate) mod pretrain;
pub(crate) mod prompt;
pub(crate) mod task;
pub(crate) mod train;
pub(crate) mod training;
pub(crate) mod up;
pub(crate) mod worker;
pub(crate) mod workers;
