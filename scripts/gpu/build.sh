#!/usr/bin/env bash
# Builds what check.sh runs, on a machine that need not have a GPU, into one folder, and that into one file, which can be carried to
# a machine that has:
#
#   scripts/gpu/build.sh [--gloo] [FOLDER]     default: target/gpu, and target/gpu.tar.xz
#
# The file and the repository are all that check.sh needs. Of INCIPIT_SHARED, by default ../shared, the small model and the data of
# trec go along, where they are there. With --gloo the program connects processes by Gloo too; it then starts only where that
# library is. Packing takes xz and 6 GB of memory.
set -euo pipefail
program_features=cuda
if [ "${1:-}" = --gloo ]; then
  program_features=cuda,gloo
  shift
fi
folder="${1:+$(realpath -m "$1")}"
shared="${INCIPIT_SHARED:+$(realpath -m "$INCIPIT_SHARED")}"
cd "$(dirname "$0")/../.."
folder="${folder:-$PWD/target/gpu}"
shared="${shared:-$PWD/../shared}"
. scripts/setup.sh
. scripts/cuda-toolkit.sh
if [ "$program_features" = cuda,gloo ]; then
  need_gloo
fi
command -v xz >/dev/null || { echo "build: xz is missing, with which the folder is packed: apt-get install xz-utils" >&2; exit 1; }
mkdir -p "$folder"

cargo build --release --locked -p incipit-cli --features "$program_features"
cp target/release/incipit "$folder/incipit"

cargo test --release --locked --no-run --message-format=json-render-diagnostics \
  -p incipit-kernels -p incipit-tests -p incipit-collective --lib --test gpu --test nccl \
  --features "incipit-kernels/cuda,incipit-tests/cuda,incipit-collective/nccl" >"$folder/messages.json"
python3 - "$folder" <<'PY'
import json, pathlib, shutil, sys

folder = pathlib.Path(sys.argv[1])
names = {"incipit_kernels": "kernels-tests", "gpu": "model-tests", "nccl": "nccl-tests"}
lines = (folder / "messages.json").read_text().splitlines()
messages = [json.loads(line) for line in lines if line.startswith("{")]
for message in messages:
    if message.get("executable") and message["target"]["name"] in names:
        shutil.copy(message["executable"], folder / names.pop(message["target"]["name"]))
if names:
    sys.exit(f"build: cargo did not say where these are: {', '.join(names.values())}")
PY
rm "$folder/messages.json"

strip "$folder"/incipit "$folder"/*-tests
{ git describe --always --dirty 2>/dev/null || echo "not known"; } >"$folder/commit"
rm -rf "$folder/carried"
if [ -d "$shared/models/t5-mini-lm" ] && [ -d "$shared/data/trec" ]; then
  mkdir -p "$folder/carried/models" "$folder/carried/data"
  cp -rL "$shared/models/t5-mini-lm" "$folder/carried/models/"
  cp -rL "$shared/data/trec" "$folder/carried/data/"
  chmod -R u+w "$folder/carried"
fi
du -sh "$folder"/*

# candle's kernels are in each program: a window that is wider than all of them has them once.
tar -C "$folder" --exclude=./logs -cf - . | xz -T1 --lzma2=preset=9,dict=512MiB >"$folder.tar.xz.part"
mv "$folder.tar.xz.part" "$folder.tar.xz"
du -h "$folder.tar.xz"
