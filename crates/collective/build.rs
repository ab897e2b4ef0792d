//! Compiles the part in C++, if the feature `gloo` asks for it.

#[cfg(feature = "gloo")]
fn main() {
    println!("cargo:rerun-if-changed=src/gloo/shim.h");
    println!("cargo:rerun-if-changed=src/gloo/shim.cc");
    cxx_build::bridge("src/gloo/ffi.rs").file("src/gloo/shim.cc").std("c++17").compile("incipit-gloo");
    println!("cargo:rustc-link-lib=gloo");
}

#[cfg(not(feature = "gloo"))]
fn main() {}
