//! Files as memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use incipit_kernels::ByteOwner;

use crate::error::{Result, io};

/// The bytes of a file, mapped: read when touched, dropped by the system when memory is short.
pub(crate) fn map(path: &Path) -> Result<ByteOwner> {
    let file = File::open(path).map_err(io("open", path))?;
    // SAFETY: the mapping is read-only and private to this process. Weights are published by rename (by us and by the Hub's
    // cache) and not written afterwards; whoever cuts a file short while a model runs on it ends the process with SIGBUS,
    // as with any reader that maps its weights.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io("map", path))?;
    Ok(Arc::new(map))
}
