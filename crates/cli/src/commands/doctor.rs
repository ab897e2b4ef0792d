//! `incipit doctor`: what the machine has, and what is missing for what.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use incipit_kernels::{GpuInfo, Isa};
use serde::Serialize;

use crate::args::Global;
use crate::exit::Exit;
use crate::output::{self, Printed};
use crate::{machine, units};

const GIB: u64 = 1 << 30;

/// Flags of `doctor`.
#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// Directory whose disk is looked at: where runs will be written
    #[arg(long, value_name = "DIR", default_value = ".")]
    path: PathBuf,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    cpu: Option<String>,
    cores: usize,
    threads: usize,
    cpu_features: Vec<Feature>,
    kernels: &'static str,
    memory_bytes: Option<u64>,
    available_memory_bytes: Option<u64>,
    free_disk_bytes: Option<u64>,
    build: Build,
    gpus: Vec<Gpu>,
    nccl_version: Option<String>,
    findings: Vec<Finding>,
    #[serde(skip)]
    kernel_words: String,
    #[serde(skip)]
    path: PathBuf,
}

#[derive(Serialize)]
struct Feature {
    name: &'static str,
    present: bool,
}

#[derive(Serialize)]
struct Gpu {
    ordinal: usize,
    name: String,
    compute_capability: String,
    memory_bytes: u64,
    free_memory_bytes: u64,
}

/// What was compiled into this program.
#[derive(Serialize)]
struct Build {
    cpu: bool,
    cuda: bool,
    nccl: bool,
    gloo: bool,
}

#[derive(Serialize)]
struct Finding {
    /// Whether the thing works.
    ok: bool,
    what: String,
}

impl Finding {
    fn new(ok: bool, what: impl Into<String>) -> Self {
        Self { ok, what: what.into() }
    }
}

/// Prints the report.
///
/// # Errors
/// If standard output cannot be written.
pub(crate) fn run(args: &DoctorArgs, global: &Global) -> Result<Exit> {
    output::print(&examine(args), global.json)?;
    Ok(Exit::Ok)
}

fn examine(args: &DoctorArgs) -> Report {
    let nccl = nccl();
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: machine::cpu_name(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        threads: rayon::current_num_threads(),
        cpu_features: cpu_features(),
        kernels: incipit_kernels::isa().name(),
        memory_bytes: machine::total_memory(),
        available_memory_bytes: machine::available_memory(),
        free_disk_bytes: machine::free_disk(&args.path),
        build: Build {
            cpu: true,
            cuda: incipit_kernels::CUDA_IS_BUILT,
            nccl: cfg!(feature = "cuda"),
            gloo: cfg!(feature = "gloo"),
        },
        gpus: Vec::new(),
        nccl_version: nccl.version,
        findings: Vec::new(),
        kernel_words: machine::kernel_path(),
        path: args.path.clone(),
    };
    let gpus = gpu_findings(&mut report);
    report.findings = findings(&report);
    report.findings.extend(gpus);
    report.findings.extend(nccl.fault);
    report
}

/// The NCCL that this program runs with, and what is known to go wrong with it.
#[derive(Default)]
struct Nccl {
    version: Option<String>,
    fault: Option<Finding>,
}

#[cfg(feature = "cuda")]
fn nccl() -> Nccl {
    let Ok(version) = incipit_collective::nccl::version() else { return Nccl::default() };
    let fault = version.fault().map(|fault| Finding::new(false, format!("NCCL {version}: {fault}")));
    Nccl { version: Some(version.to_string()), fault }
}

#[cfg(not(feature = "cuda"))]
fn nccl() -> Nccl {
    Nccl::default()
}

/// The oldest GPUs that the kernels were compiled for: Ampere.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Lists the GPUs, and says what works on them and what is missing.
fn gpu_findings(report: &mut Report) -> Vec<Finding> {
    let gpus = match incipit_kernels::gpus() {
        Ok(gpus) => gpus,
        Err(error) => return vec![Finding::new(false, format!("GPUs: {error}"))],
    };
    let mut findings = Vec::new();
    if gpus.is_empty() {
        findings.push(Finding::new(
            false,
            "GPUs: the driver answers, and knows of none (CUDA_VISIBLE_DEVICES may hide them)",
        ));
    }
    for gpu in &gpus {
        let (major, minor) = gpu.capability;
        let name = format!("GPU {} ({})", gpu.ordinal, gpu.name);
        findings.push(if gpu.capability < LEAST_CAPABILITY {
            Finding::new(
                false,
                format!("{name} has compute capability {major}.{minor}, and the kernels need 8.0 or more"),
            )
        } else {
            match incipit_kernels::open_gpu(gpu.ordinal) {
                Ok(_) => Finding::new(true, format!("{name}: --device cuda:{}", gpu.ordinal)),
                Err(error) => Finding::new(false, format!("{name} cannot be used: {error}")),
            }
        });
    }
    let several = gpus.len() > 1 && report.nccl_version.is_some();
    findings.push(Finding::new(
        several,
        if several {
            "several GPUs together (`incipit launch --nproc N -- ... --device cuda --collective nccl`)"
        } else {
            "several GPUs together need two GPUs or more, and NCCL 2.18 or newer"
        },
    ));
    report.gpus = gpus.into_iter().map(Gpu::from).collect();
    findings
}

impl From<GpuInfo> for Gpu {
    fn from(gpu: GpuInfo) -> Self {
        let GpuInfo { ordinal, name, capability: (major, minor), memory } = gpu;
        Self {
            ordinal,
            name,
            compute_capability: format!("{major}.{minor}"),
            memory_bytes: memory.total,
            free_memory_bytes: memory.free,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<Feature> {
    let feature = |name, present| Feature { name, present };
    vec![
        feature("avx2", is_x86_feature_detected!("avx2")),
        feature("fma", is_x86_feature_detected!("fma")),
        feature("avx512f", is_x86_feature_detected!("avx512f")),
        feature("avx512bw", is_x86_feature_detected!("avx512bw")),
        feature("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
        // The standard library's word for AMX is not stable yet.
        feature("amx_bf16", Isa::AmxBf16.is_available()),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<Feature> {
    Vec::new()
}

fn findings(report: &Report) -> Vec<Finding> {
    let mut findings = vec![Finding::new(true, "tuning, evaluation and generation on this machine's CPU")];
    findings.push(match incipit_kernels::isa() {
        Isa::AmxBf16 | Isa::Avx512Bf16 => Finding::new(true, "bf16 at full speed"),
        Isa::Avx512 | Isa::Avx2 => Finding::new(
            false,
            "bf16 at full speed needs a CPU with avx512_bf16; bf16 works here by widening to f32, at about the speed of f32",
        ),
        Isa::Portable => Finding::new(false, "fast kernels need a CPU with avx2 and fma; the portable ones are several times slower"),
    });
    findings.extend(report.available_memory_bytes.map(backbone_finding));
    findings.push(match report.free_disk_bytes {
        Some(free) if free < GIB => Finding::new(
            false,
            format!(
                "only {} free on the disk of {}: a run needs room for checkpoints",
                units::bytes(free),
                report.path.display()
            ),
        ),
        Some(_) => Finding::new(true, format!("room for runs on the disk of {}", report.path.display())),
        None => Finding::new(
            false,
            format!(
                "{} cannot be looked at: give a directory that exists with --path",
                report.path.display()
            ),
        ),
    });
    findings.push(Finding::new(true, "several ranks as threads of one process (--tp, --dp)"));
    findings.push(if report.build.gloo {
        Finding::new(true, "several ranks as processes, on this machine or many (`incipit launch`, --collective gloo)")
    } else {
        Finding::new(
            false,
            "several ranks as processes: this program was built without gloo (`--features gloo`, with Debian's libgloo-dev)",
        )
    });
    findings
}

/// The largest published T5 1.1 whose bf16 weights lie in memory with room to compute. A larger one runs too, from the disk's cache.
fn backbone_finding(available: u64) -> Finding {
    const SIZES: [(&str, u64); 5] = [
        ("T5-XXL", 11_135_332_352),
        ("T5-XL", 2_849_757_184),
        ("T5-Large", 783_150_080),
        ("T5-Base", 247_577_856),
        ("T5-Small", 76_961_152),
    ];
    let fits = SIZES.iter().find(|(_, parameters)| 2 * parameters + 2 * GIB <= available);
    match fits {
        Some((name, _)) => Finding::new(
            true,
            format!(
                "backbones up to {name} stay in memory in bf16; larger ones are read from disk again at each step, slowly"
            ),
        ),
        None => Finding::new(
            false,
            format!("{} of memory is little: even T5-Small wants 2.2 GiB in bf16", units::bytes(available)),
        ),
    }
}

impl Printed for Report {
    fn text(&self) -> String {
        let known = |n: Option<u64>| n.map_or_else(|| "not told by this system".to_owned(), units::bytes);
        let features =
            self.cpu_features.iter().map(|f| format!("{} {}", f.name, if f.present { "yes" } else { "no" }));
        let features = features.collect::<Vec<_>>().join(", ");
        let built = |name: &str, yes: bool| format!("{name} {}", if yes { "yes" } else { "no" });
        let build = [
            built("cpu", self.build.cpu),
            built("cuda", self.build.cuda),
            built("nccl", self.build.nccl),
            built("gloo", self.build.gloo),
        ];
        let gpu = |gpu: &Gpu| {
            let Gpu { ordinal, name, compute_capability, memory_bytes, free_memory_bytes } = gpu;
            format!(
                "{ordinal}: {name}, compute capability {compute_capability}, {} ({} free)",
                units::bytes(*memory_bytes),
                units::bytes(*free_memory_bytes)
            )
        };
        let gpus: Vec<String> = self.gpus.iter().map(gpu).collect();
        let facts = output::facts([
            ("incipit", self.version.to_owned()),
            ("CPU", self.cpu.clone().unwrap_or_else(|| std::env::consts::ARCH.to_owned())),
            ("cores", format!("{} ({} threads in use)", self.cores, self.threads)),
            (
                "CPU features",
                if features.is_empty() { "none that the kernels know".to_owned() } else { features },
            ),
            ("kernels", self.kernel_words.clone()),
            (
                "memory",
                format!("{} ({} available)", known(self.memory_bytes), known(self.available_memory_bytes)),
            ),
            ("free disk", known(self.free_disk_bytes)),
            (
                "GPUs",
                if gpus.is_empty() { "none that this build can use".to_owned() } else { gpus.join("; ") },
            ),
            ("NCCL", self.nccl_version.clone().unwrap_or_else(|| "none".to_owned())),
            ("this build", build.join(", ")),
        ]);
        let findings: Vec<String> = self
            .findings
            .iter()
            .map(|f| format!("  {}  {}", if f.ok { "ok     " } else { "missing" }, f.what))
            .collect();
        format!("{facts}\n\n{}", findings.join("\n"))
    }
}
