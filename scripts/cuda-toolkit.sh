#!/usr/bin/env bash
# Makes a CUDA 13.0 toolkit ready for building with the feature `cuda`. Sourced by other scripts, or by hand:
#
#   . scripts/cuda-toolkit.sh && cargo build --release --features cuda
#
# An installed toolkit is used where there is one: CUDA_HOME, /usr/local/cuda, or the one whose nvcc is on the PATH. Otherwise one
# is put together from the wheels that NVIDIA publishes for Python (about 1 GB, no GPU and no root needed) in the folder
# INCIPIT_CUDA_TOOLKIT, by default target/cuda-toolkit. What is set: CUDA_HOME, CUDA_ROOT and PATH; CUDA_COMPUTE_CAP unless it is
# set (80: candle's kernels are built for it, and the driver
# translates them for what is newer); LIBRARY_PATH for the linker.
#
# A build machine has no driver, so that libcuda.so.1 is missing: a library with the driver's names in it stands in when linking.
# INCIPIT_CUDA_RUN is set to the folders that a program needs in LD_LIBRARY_PATH to start on a machine without a driver; there
# every call to the stand-in fails with "stub library", and the program says that there is no GPU. It must not be in the path
# where there is a driver.
set -euo pipefail

cuda_here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cuda_folder="${INCIPIT_CUDA_TOOLKIT:-$cuda_here/target/cuda-toolkit}"

cuda_installed() {
  local nvcc
  for nvcc in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" /usr/local/cuda/bin/nvcc "$(command -v nvcc || true)"; do
    if [ -n "$nvcc" ] && [ -x "$nvcc" ] && "$nvcc" --version | grep -Eq 'release 1[3-9]\.'; then
      dirname "$(dirname "$(readlink -f "$nvcc")")"
      return
    fi
  done
}

# The parts, each pinned. cuRAND and NCCL have version numbers of their own.
cuda_wheels=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35
  nvidia-nccl-cu13==2.30.7
)

cuda_from_wheels() {
  local done="$cuda_folder/made-of" site
  if [ "$(cat "$done" 2>/dev/null)" != "${cuda_wheels[*]}" ]; then
    if [ "${INCIPIT_NO_INSTALL:-0}" = 1 ]; then
      echo "cuda-toolkit: no CUDA 13 toolkit here (set CUDA_HOME), and INCIPIT_NO_INSTALL=1 forbids fetching one" >&2
      return 1
    fi
    echo "cuda-toolkit: fetching CUDA 13.0 into $cuda_folder (about 1 GB)" >&2
    rm -rf "$cuda_folder"
    mkdir -p "$cuda_folder/packages"
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
      --target "$cuda_folder/packages" "${cuda_wheels[@]}" >&2
    echo "${cuda_wheels[*]}" >"$done"
  fi
  site="$cuda_folder/packages/nvidia"
  # NCCL has a folder of its own; candle and cudarc look for it beside the rest.
  for part in include lib; do
    for file in "$site/nccl/$part"/*; do
      ln -sfn "$file" "$site/cu13/$part/$(basename "$file")"
    done
  done
  [ -e "$site/cu13/lib64" ] || ln -s lib "$site/cu13/lib64"
  echo "$site/cu13"
}

# The linker looks for names without versions; wheels have none.
cuda_links() {
  local folder="$cuda_folder/links" file name
  mkdir -p "$folder"
  for name in cublas cublasLt curand nvrtc cudart nccl; do
    for file in "$CUDA_HOME"/lib64/lib$name.so.*; do
      [ -e "$file" ] && ln -sfn "$file" "$folder/lib$name.so"
    done
  done
}

# Every name of the driver's header that looks like a function's, as a function that says: this is no driver.
cuda_stand_in() {
  local folder="$cuda_folder/stand-in" source
  mkdir -p "$folder"
  [ -e "$folder/libcuda.so.1" ] && [ "$folder/libcuda.so.1" -nt "$CUDA_HOME/include/cuda.h" ] && return
  source="$folder/driver.c"
  echo '/* CUDA_ERROR_STUB_LIBRARY, as in the stub that NVIDIA ships with the toolkit. */' >"$source"
  grep -ohE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+)?(_ptsz|_ptds)?\b' "$CUDA_HOME/include/cuda.h" | sort -u |
    sed 's/.*/int &(void) { return 34; }/' >>"$source"
  cc -shared -fPIC -O1 -w -fno-builtin -Wl,-soname,libcuda.so.1 -o "$folder/libcuda.so.1" "$source"
  ln -sfn libcuda.so.1 "$folder/libcuda.so"
}

CUDA_HOME="$(cuda_installed)"
[ -n "$CUDA_HOME" ] || CUDA_HOME="$(cuda_from_wheels)"
cuda_links
cuda_stand_in
export CUDA_HOME CUDA_ROOT="$CUDA_HOME" CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
export PATH="$CUDA_HOME/bin:$PATH"
export LIBRARY_PATH="$cuda_folder/links:$cuda_folder/stand-in:$CUDA_HOME/lib64${LIBRARY_PATH:+:$LIBRARY_PATH}"
export INCIPIT_CUDA_RUN="$cuda_folder/stand-in:$CUDA_HOME/lib64"
