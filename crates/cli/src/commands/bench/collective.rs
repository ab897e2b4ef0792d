//! `incipit bench collective`: how fast ranks exchange numbers.

use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use clap::Args;
use incipit_collective::{Collective, Ranks, Reduce};
use incipit_tune::device::DeviceChoice;
use incipit_tune::spec::Backend;
use serde::Serialize;

use super::median;
use crate::args::Global;
use crate::exit::bad_input;
use crate::output::{self, Printed};
use crate::progress;
use crate::ranks::{self, RankArgs, environment};
use crate::units;

/// The step from one size to the next.
const GROWTH: u64 = 4;
/// Bytes of an f32.
const WIDTH: u64 = 4;
const MEGABYTE: f64 = 1e6;
const RANKS: usize = 2;

const AFTER_HELP: &str = "\
Every rank gives numbers of type f32. A size is that of the whole result, in units of 1024 bytes: an all-reduce of 1KB adds up 256 \
numbers of each rank, an all-gather of 1KB puts together 1KB from all ranks. Latency is the median of a rank's times, of the slowest \
rank. The bandwidth of the algorithm is size / latency; that of the bus is it times 2 (n - 1) / n for an all-reduce of n ranks and \
(n - 1) / n for an all-gather: what each rank has to send at least.

Examples:
  incipit bench collective --ranks 4                          threads of one process
  incipit launch --nproc 2 -- bench collective --json         processes on this machine";

/// Flags of `bench collective`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CollectiveArgs {
    /// Sizes: one, a list, or FIRST..LAST in powers of four
    #[arg(long, value_name = "SIZES", default_value = "1KB..64MB", value_parser = parse_sizes)]
    sizes: Sizes,
    /// What a rank is: a thread of this process (local), or a process that `incipit launch` started (gloo; with a GPU each, nccl)
    /// [default: local]
    #[arg(long, value_name = "local|gloo|nccl", value_parser = ranks::collective)]
    pub(crate) collective: Option<Backend>,
    /// Where the numbers are: cpu, cuda (each rank on the GPU of its number) or cuda:N [default: cpu; cuda with nccl]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Threads that are ranks [default: 2]; processes are as many as were started
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    ranks: Option<u16>,
    /// Times that each operation is timed, after one that is not
    #[arg(long, value_name = "N", default_value_t = 20)]
    steps: usize,
}

/// Bytes.
#[derive(Clone, Debug, PartialEq)]
struct Sizes(Vec<u64>);

#[derive(Serialize)]
pub(super) struct Report {
    collective: String,
    ranks: usize,
    steps: usize,
    operations: Vec<Row>,
}

/// One operation at one size.
#[derive(Serialize)]
struct Row {
    operation: &'static str,
    /// Of the result; none of a barrier.
    bytes: Option<u64>,
    latency_us: f64,
    /// Size by latency.
    algorithm_mb_s: Option<f64>,
    /// What each rank has to send at least, by latency.
    bus_mb_s: Option<f64>,
}

/// `1KB..64MB`, `1MB`, or `4KB,1MB`.
fn parse_sizes(text: &str) -> Result<Sizes, String> {
    let size = |part: &str| {
        // As everybody who measures exchanges, with units of 1024.
        let part = part.trim().to_ascii_lowercase().replace("ib", "b");
        let bytes = units::parse_bytes(&part.replace("kb", "kib").replace("mb", "mib").replace("gb", "gib"))?;
        if bytes % WIDTH == 0 {
            Ok(bytes)
        } else {
            Err(format!("`{part}` is no whole number of f32, 4 bytes each"))
        }
    };
    let Some((first, last)) = text.split_once("..") else {
        return text.split(',').map(size).collect::<Result<_, _>>().map(Sizes);
    };
    let (first, last) = (size(first)?, size(last)?);
    if first > last {
        return Err(format!("`{text}` ends before it begins: write the smaller size first"));
    }
    let next = |bytes: &u64| bytes.checked_mul(GROWTH).filter(|bytes| *bytes <= last);
    Ok(Sizes(std::iter::successors(Some(first), next).collect()))
}

/// Times the operations.
///
/// # Errors
/// If the ranks cannot meet, or an operation fails.
pub(super) fn measure(args: &CollectiveArgs, global: &Global) -> Result<Report> {
    if args.steps == 0 {
        return bad_input("--steps is 0: nothing would be timed");
    }
    let collective = args.collective.unwrap_or(Backend::Local);
    let count = match (collective, args.ranks) {
        (Backend::Local, given) => given.map_or(RANKS, usize::from),
        (Backend::Gloo | Backend::Nccl, None) => environment::place(&environment::variables)?.world,
        (Backend::Gloo | Backend::Nccl, Some(_)) => {
            return bad_input(
                "--ranks is for threads: processes are as many as `incipit launch --nproc` starts",
            );
        }
    };
    // Examples are divided between replicas; the group of all ranks is what is measured.
    let ranks = RankArgs { tp: None, dp: Some(count), collective: Some(collective), deadline: 300 };
    let default = if collective == Backend::Nccl { DeviceChoice::Cuda(None) } else { DeviceChoice::Cpu };
    let device = args.device.unwrap_or(default);
    let operations = ranks::run(&ranks, device, global.threads, |ranks| {
        on_rank(ranks, &device.open(ranks)?, args, global)
    })?;
    Ok(Report { collective: collective.to_string(), ranks: count, steps: args.steps, operations })
}

fn on_rank(ranks: &Ranks, device: &Device, args: &CollectiveArgs, global: &Global) -> Result<Vec<Row>> {
    let (group, Sizes(sizes)) = (&**ranks.world(), &args.sizes);
    let n = group.size() as f64;
    let bar = ranks.leads().then(|| progress::bar(2 * sizes.len() as u64 + 1, "measurements", global));
    let done = || bar.iter().for_each(|bar| bar.inc(1));
    let time = |operation: &dyn Fn() -> incipit_collective::Result<()>| {
        let seconds = seconds(group, args.steps, operation);
        done();
        seconds
    };
    let mut rows = vec![row("barrier", None, time(&|| group.barrier())?, 0.0)];
    for bytes in sizes {
        let x = numbers(bytes / WIDTH, device)?;
        let seconds = time(&|| done_on(&group.all_reduce(&x, Reduce::Sum)?))?;
        rows.push(row("all_reduce", Some(*bytes), seconds, 2.0 * (n - 1.0) / n));
    }
    for bytes in sizes {
        let mine = (bytes / WIDTH).div_ceil(group.size() as u64);
        let x = numbers(mine, device)?;
        let seconds = time(&|| done_on(&group.all_gather(&x)?))?;
        rows.push(row("all_gather", Some(mine * group.size() as u64 * WIDTH), seconds, (n - 1.0) / n));
    }
    Ok(rows)
}

/// Waits until a result is there.
fn done_on(result: &Tensor) -> incipit_collective::Result<()> {
    Ok(result.device().synchronize()?)
}

fn numbers(count: u64, device: &Device) -> Result<Tensor> {
    Ok(Tensor::ones(usize::try_from(count)?, DType::F32, device)?)
}

fn row(operation: &'static str, bytes: Option<u64>, seconds: f64, bus: f64) -> Row {
    let algorithm_mb_s = bytes.map(|bytes| bytes as f64 / MEGABYTE / seconds);
    Row {
        operation,
        bytes,
        latency_us: 1e6 * seconds,
        algorithm_mb_s,
        bus_mb_s: algorithm_mb_s.map(|rate| rate * bus),
    }
}

/// The median time of an operation on the slowest rank.
fn seconds(
    group: &dyn Collective,
    steps: usize,
    operation: &dyn Fn() -> incipit_collective::Result<()>,
) -> Result<f64> {
    operation()?;
    let mut times = Vec::with_capacity(steps);
    for _ in 0..steps {
        // Ranks begin together, so that none waits for another that is late from the operation before.
        group.barrier()?;
        let start = Instant::now();
        operation()?;
        times.push(start.elapsed().as_secs_f64());
    }
    let own = Tensor::from_slice(&[median(&times) as f32], 1, &Device::Cpu)?;
    Ok(f64::from(group.all_reduce(&own, Reduce::Max)?.to_vec1::<f32>()?[0]))
}

impl Printed for Report {
    fn text(&self) -> String {
        let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), units::rate);
        let row = |row: &Row| {
            let size = row.bytes.map_or_else(|| "-".to_owned(), units::bytes);
            let name = format!("{} {size}", row.operation.replace('_', "-"));
            vec![name, units::rate(row.latency_us), rate(row.algorithm_mb_s), rate(row.bus_mb_s)]
        };
        let rows: Vec<_> = self.operations.iter().map(row).collect();
        let header = ["operation", "latency, us", "algorithm, MB/s", "bus, MB/s"];
        let Self { collective, ranks, steps, .. } = self;
        format!(
            "{ranks} ranks over {collective}, medians of {steps}\n{}",
            output::table(&header, &rows, true)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_one_a_list_or_a_span_in_powers_of_four() {
        assert_eq!(parse_sizes("1KB..20kb"), Ok(Sizes(vec![1024, 4096, 16_384])));
        assert_eq!(parse_sizes("1KiB..64MB").map(|Sizes(sizes)| (sizes.len(), sizes[8])), Ok((9, 64 << 20)));
        assert_eq!(parse_sizes("8, 1MB"), Ok(Sizes(vec![8, 1 << 20])));
        for bad in ["", "2MB..1MB", "5", "..", "1KB..", "1 parsec"] {
            assert!(parse_sizes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bus_carries_what_the_algorithm_makes_it() {
        let row = row("all_reduce", Some(1_000_000), 0.5, 1.5);
        assert_eq!((row.latency_us, row.algorithm_mb_s, row.bus_mb_s), (500_000.0, Some(2.0), Some(3.0)));
    }
}
