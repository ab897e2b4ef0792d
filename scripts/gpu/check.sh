#!/usr/bin/env bash
# Every check and benchmark that needs a GPU, in one go, on a machine that need not have Rust or a network:
#
#   scripts/gpu/check.sh [FOLDER|FILE]     what build.sh made; default: target/gpu, built first if it is not there and cargo is
#
# Prints GPU, driver, CUDA and NCCL; runs kernel parity, model parity, isolation of jobs, NCCL with two ranks on one GPU, a training run, jobs
# over gRPC on a resident backbone that are paused and lose their engine, and G1 and G2 beside PyTorch + PEFT where those are installed; ends
# with one table, and with 1 if a part failed. A part that cannot run here is skipped, with the reason. The logs in one file, the figures
# and a Markdown page go to OUT (default: target/gpu/logs). Each part has a time limit, all of them together INCIPIT_CHECK_SECONDS (540);
# INCIPIT_CHECK_PARTS picks parts by how their names begin, as in "NCCL,G1 xxl". INCIPIT_PYTHON names a Python with PyTorch, if it is not
# python3.
set -euo pipefail
given="${1:+$(realpath -m "$1")}"
out="${OUT:+$(realpath -m "$OUT")}"
cd "$(dirname "$0")/../.."
python="${INCIPIT_PYTHON:-python3}"
folder="${given:-$PWD/target/gpu}"
out="${out:-$PWD/target/gpu/logs}"
if [ -n "$given" ] && [ ! -e "$given" ]; then
  echo "check: there is no $given; give the folder or the file that build.sh made" >&2
  exit 1
elif [ -f "$folder" ]; then
  unpacked="$(mktemp -d)"
  trap 'rm -rf "$unpacked"' EXIT
  "$python" -c 'import shutil, sys; shutil.unpack_archive(*sys.argv[1:])' "$folder" "$unpacked"
  folder="$unpacked"
elif [ ! -x "$folder/incipit" ] && { command -v cargo || [ -x "$HOME/.cargo/bin/cargo" ]; } >/dev/null 2>&1; then
  scripts/gpu/build.sh "$folder" >&2 || echo "check: building failed; see above" >&2
fi
mkdir -p "$folder" "$out"
"$python" -B scripts/gpu/check.py "$folder" "$out"
