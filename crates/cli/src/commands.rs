//! The commands, one module each: their flags, and what they do.

pub(crate) mod backbone;
pub(crate) mod bench;
pub(crate) mod convert;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod launch;
pub(crate) mod train;
