//! Times of kernels, from events before and behind each of them.

use std::collections::HashMap;

use cudarc::driver::{CudaEvent, DriverError};

use super::device::KernelTime;

/// What ran since the profile was begun.
#[derive(Default)]
pub(super) struct Profile {
    spans: Vec<(String, CudaEvent, CudaEvent)>,
}

impl Profile {
    pub(super) fn push(&mut self, name: String, before: CudaEvent, after: CudaEvent) {
        self.spans.push((name, before, after));
    }

    /// By name, longest first. The device must have come to the end of them.
    pub(super) fn times(self) -> Result<Vec<KernelTime>, DriverError> {
        let mut totals: HashMap<String, (u64, f64)> = HashMap::new();
        for (name, before, after) in self.spans {
            let total = totals.entry(name).or_default();
            total.0 += 1;
            total.1 += f64::from(before.elapsed_ms(&after)?) / 1e3;
        }
        let time = |(name, (launches, seconds))| KernelTime { name, launches, seconds };
        let mut times: Vec<_> = totals.into_iter().map(time).collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then_with(|| a.name.cmp(&b.name)));
        Ok(times)
    }
}
