//! A real coordinator on 127.0.0.1, callers, and agents that speak the protocol and have no model.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod blobs;
mod common;
mod crash;
mod doors;
mod requests;
mod streams;
