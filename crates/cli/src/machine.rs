//! What the program finds out about the machine it runs on.

use std::path::Path;

use incipit_kernels::{Isa, isa};

use crate::exit::bad_input;

/// The variable that chooses a kernel path by hand.
const ISA_VARIABLE: &str = "INCIPIT_ISA";

/// Refuses a kernel path that does not exist or that this machine cannot run, before a kernel panics over it.
///
/// # Errors
/// If `INCIPIT_ISA` names no path of this machine.
pub(crate) fn check_isa() -> anyhow::Result<()> {
    let Some(name) = std::env::var_os(ISA_VARIABLE) else { return Ok(()) };
    let known: Vec<&str> = Isa::ALL.into_iter().filter(|i| i.is_available()).map(Isa::name).collect();
    if known.iter().any(|k| name == *k) {
        return Ok(());
    }
    bad_input(format!(
        "{ISA_VARIABLE}={} is no kernel path of this machine: set it to {}, or unset it",
        name.to_string_lossy(),
        known.join(" or ")
    ))
}

/// The kernel path in use, in words.
pub(crate) fn kernel_path() -> String {
    let what = match isa() {
        Isa::AmxBf16 => "bf16 products in AMX tiles, all else in AVX-512",
        Isa::Avx512Bf16 => "bf16 products in AVX-512 BF16 instructions",
        Isa::Avx512 => "AVX-512, bf16 widened to f32",
        Isa::Avx2 => "AVX2 and FMA, bf16 widened to f32",
        Isa::Portable => "portable code",
    };
    format!("{} ({what})", isa().name())
}

/// The processor's name, where the system tells it.
pub(crate) fn cpu_name() -> Option<String> {
    field(&std::fs::read_to_string("/proc/cpuinfo").ok()?, "model name")
}

/// Memory that a new program can have, in bytes, where the system tells it: of the machine, or of the control group that this
/// process is confined to.
pub(crate) fn available_memory() -> Option<u64> {
    let machine = kib_field("/proc/meminfo", "MemAvailable");
    let group = || {
        let number = |file: &str| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
        let limit = number("/sys/fs/cgroup/memory.max")?;
        Some(limit.saturating_sub(number("/sys/fs/cgroup/memory.current")?))
    };
    machine.into_iter().chain(group()).min()
}

/// The machine's memory in bytes.
pub(crate) fn total_memory() -> Option<u64> {
    kib_field("/proc/meminfo", "MemTotal")
}

/// The most memory this process has held so far, in bytes.
pub(crate) fn peak_memory() -> Option<u64> {
    kib_field("/proc/self/status", "VmHWM")
}

/// Of the memory that this process holds now, the part that is not a view of a file, in bytes.
pub(crate) fn anonymous_memory() -> Option<u64> {
    kib_field("/proc/self/status", "RssAnon")
}

/// Bytes that this process has had read from disks so far, views of files included, where the system tells it.
pub(crate) fn bytes_read() -> Option<u64> {
    field(&std::fs::read_to_string("/proc/self/io").ok()?, "read_bytes")?.parse().ok()
}

/// Free bytes on the disk that holds `path`, for those who may write there.
pub(crate) fn free_disk(path: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(path).ok()?;
    Some(disk.f_bavail * disk.f_frsize)
}

fn kib_field(file: &str, name: &str) -> Option<u64> {
    let value = field(&std::fs::read_to_string(file).ok()?, name)?;
    Some(1024 * value.trim_end_matches("kB").trim().parse::<u64>().ok()?)
}

/// The value of the first line `name : value`.
fn field(text: &str, name: &str) -> Option<String> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_files_are_found_by_their_whole_name() {
        let text = "model\t\t: 207\nmodel name\t: A CPU @ 2 GHz\n";
        assert_eq!(field(text, "model name").as_deref(), Some("A CPU @ 2 GHz"));
        assert_eq!(field(text, "mode"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_told_and_the_peak_is_not_less_than_what_is_held() {
        let (peak, anonymous) = (peak_memory().expect("VmHWM"), anonymous_memory().expect("RssAnon"));
        assert!(peak >= anonymous && anonymous > 100_000, "{peak} {anonymous}");
        assert!(total_memory().expect("MemTotal") >= available_memory().expect("MemAvailable"));
    }
}
