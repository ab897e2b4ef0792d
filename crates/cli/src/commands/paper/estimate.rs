//! How long what is left will take.

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::execute::Progress;
use super::plan::Plan;

/// Starting a process, reading a small model and its data, in seconds.
const START: f64 = 0.5;
/// Side of the matrices whose product is timed.
const SIDE: usize = 512;
/// How long it is timed.
const PROBE: Duration = Duration::from_millis(200);

/// At the speed of the runs that are done; none if there are none, or the size of a model is not known.
pub(super) fn left(plan: &Plan<'_>, progress: &Progress) -> Option<Duration> {
    let rate = rate(progress)?;
    let undone = || plan.runs.iter().zip(&progress.done).filter(|(_, done)| done.is_none());
    let work = undone().map(|(run, _)| run.work).sum::<Option<f64>>()?;
    Some(Duration::from_secs_f64(work / rate + START * undone().count() as f64))
}

/// Floating-point operations a second of the runs that are done.
pub(super) fn rate(progress: &Progress) -> Option<f64> {
    let known = progress.done.iter().flatten().filter(|done| done.work.is_some_and(|work| work > 0.0));
    let (work, seconds) = known.fold((0.0, 0.0), |(work, seconds), done| {
        (work + done.work.unwrap_or_default(), seconds + (done.seconds - START).max(0.1))
    });
    (work > 0.0).then(|| work / seconds)
}

/// Floating-point operations a second of a plain product of matrices on this machine's CPU, in f32.
///
/// # Errors
/// If the matrices cannot be made.
pub(super) fn product_rate() -> candle_core::Result<f64> {
    let matrix = Tensor::rand(-1f32, 1f32, (SIDE, SIDE), &Device::Cpu)?;
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < PROBE {
        matrix.matmul(&matrix)?;
        count += 1;
    }
    Ok(2.0 * (SIDE as f64).powi(3) * f64::from(count) / start.elapsed().as_secs_f64())
}
