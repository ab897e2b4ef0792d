//! Compiles the CUDA kernels: with nvcc into an image for GPUs (feature `cuda`), and with the host's C++ compiler into the emulator
//! that tests run them on (feature `emulator`).

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        image(
            Path::new(&std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
                .join("kernels.fatbin")
                .as_path(),
        );
    }
    #[cfg(feature = "emulator")]
    emulator();
}

/// For Hopper as machine code, with what it alone has, and for all from Ampere on as code that the driver translates once.
fn image(out: &Path) {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let nvcc =
        std::env::var_os("CUDA_HOME").map_or_else(|| "nvcc".into(), |home| Path::new(&home).join("bin/nvcc"));
    let status = std::process::Command::new(&nvcc)
        .args(["-std=c++17", "-O3", "-fatbin", "-Werror", "all-warnings"])
        .args(["-gencode", "arch=compute_80,code=compute_80", "-gencode", "arch=compute_90a,code=sm_90a"])
        .arg("-o")
        .arg(out)
        .arg("cuda/kernels.cu")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} could not compile cuda/kernels.cu: {status}", nvcc.display()),
        Err(error) => panic!(
            "{} cannot be run ({error}): the feature `cuda` needs a CUDA 13 toolkit; run `. scripts/cuda-toolkit.sh` before cargo",
            nvcc.display()
        ),
    }
}

#[cfg(feature = "emulator")]
fn emulator() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        // Kernels see numbers of 16 bytes through other types, as on the GPU; and fibers jump between stacks.
        .flags(["-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-ffp-contract=off"])
        .flag_if_supported("-Wno-unknown-pragmas")
        .include("cuda")
        .file("cuda/emulator/unit.cc")
        .compile("incipit_emulated_kernels");
}
