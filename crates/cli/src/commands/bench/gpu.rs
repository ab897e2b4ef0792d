//! What a step does on a GPU: launches, memory, and the time of each kernel.

use anyhow::Result;
use candle_core::Device;
use incipit_kernels::KernelTime;
use serde::Serialize;

use crate::{output, units};

/// The time of a kernel.
#[derive(Serialize)]
pub(super) struct Kernel {
    name: String,
    launches: u64,
    seconds: f64,
}

/// Times every kernel that `step` starts, longest first.
///
/// # Errors
/// If the device is no GPU, or the step fails.
pub(super) fn profile(device: &Device, step: impl FnOnce() -> Result<()>) -> Result<Vec<Kernel>> {
    incipit_kernels::profile(device)?;
    step()?;
    let kernel = |KernelTime { name, launches, seconds }| Kernel { name, launches, seconds };
    Ok(incipit_kernels::profiled(device)?.into_iter().map(kernel).collect())
}

/// The kernels as a table; nothing where none were timed.
pub(super) fn table(kernels: &[Kernel]) -> String {
    if kernels.is_empty() {
        return String::new();
    }
    let total: f64 = kernels.iter().map(|kernel| kernel.seconds).sum();
    let row = |kernel: &Kernel| {
        vec![
            kernel.name.clone(),
            units::count(kernel.launches),
            format!("{:.3} ms", 1e3 * kernel.seconds),
            units::percent(kernel.seconds / total),
        ]
    };
    let rows: Vec<_> = kernels.iter().map(row).collect();
    format!("\n\n{}", output::table(&["kernel", "launches", "time", "share"], &rows, true))
}
