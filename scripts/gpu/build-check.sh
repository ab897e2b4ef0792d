#!/usr/bin/env bash
# Compiles, lints and links everything for GPUs, on a machine that need not have one, and runs what must work without a driver:
# the program says that there is no GPU, and the tests of kernels, model and NCCL skip with a message.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/setup.sh
need_gloo
. scripts/cuda-toolkit.sh

features=incipit-cli/cuda,incipit-kernels/cuda,incipit-tests/cuda,incipit-collective/nccl
# Where the other tests are built with Gloo, so are these: without it, most crates of others have to be built anew, for other features.
case "${FEATURES[*]}" in
  *gloo*) features="$features,incipit-cli/gloo,incipit-tests/gloo" ;;
esac
packages=(-p incipit-kernels -p incipit-collective -p incipit-cli -p incipit-tests)
# One selection for all steps, so that nothing is built twice; `help` brings the program along.
tests=(--test gpu --test nccl --test help)
# Little of it runs, so that our own crates need no optimisation; those of others do not cost more, since they are built already.
quick=()
for crate in cli collective coordinator data mesh model proto tests tune weights worker; do
  quick+=(--config "profile.dev.package.incipit-$crate.opt-level=0")
done
cargo clippy "${packages[@]}" --lib --bins "${tests[@]}" --locked --features "$features" "${quick[@]}" -- -D warnings
export LD_LIBRARY_PATH="$INCIPIT_CUDA_RUN${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
cargo test "${packages[@]}" "${tests[@]}" --locked --features "$features" "${quick[@]}" -- --nocapture
program="${CARGO_TARGET_DIR:-target}/debug/incipit"
readelf -d "$program" | grep -q 'NEEDED.*libcuda\.so\.1' || { echo "build-check: libcuda.so.1 was not linked" >&2; exit 1; }
"$program" doctor
