//! Jobs, backbones and checkpoints of a cluster: a pure core, the store it is written to, and the services that it is asked over.

pub mod blobs;
pub mod config;
pub mod core;
pub mod doors;
mod http;
pub mod init;
mod server;
mod services;
pub mod shell;
pub mod store;
mod telemetry;
pub mod wire;

pub use config::{Config, Limits};
pub use server::{Error, Running, SERVICES, serve};
