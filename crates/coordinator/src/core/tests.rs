//! Tests of the core: stories, and a machine that tells random ones.

mod backbones;
mod jobs;
mod machine;
mod placement;
mod replicas;
mod reports;
mod requests;
mod retention;
mod states;
mod suspects;
mod updates;
mod workers;
mod world;
