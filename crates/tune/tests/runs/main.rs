//! What must hold of whole steps and whole runs, on a tiny random backbone.
#![allow(clippy::unwrap_used, reason = "a helper that cannot go on fails its test")]

mod engine;
mod ensembles;
mod evaluation;
mod loading;
mod multitask;
mod placements;
mod rank;
mod refusals;
mod regroup;
mod search;
mod support;
mod tenants;
mod training;
mod weights;
