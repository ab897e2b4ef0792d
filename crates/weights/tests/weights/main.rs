//! Checkpoints, fingerprints, tokenizers and writing, each on small files.
#![expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod bad_files;
mod checkpoints;
mod fingerprints;
mod random;
mod slices;
mod support;
mod tokenizers;
mod writing;
