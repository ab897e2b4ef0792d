#!/usr/bin/env bash
# Builds what check.sh runs, on a machine that need not have a GPU, into one folder that can be carried to one that has:
#
#   scripts/gpu/build.sh [--gloo] [FOLDER]     default: target/gpu
#
# The folder and the repository are all that check.sh needs. With --gloo the program connects processes by Gloo too; it then
# starts only where that library is.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/setup.sh
. scripts/cuda-toolkit.sh

program_features=cuda
if [ "${1:-}" = --gloo ]; then
  need_gloo
  program_features=cuda,gloo
  shift
fi
folder="${1:-target/gpu}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"

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
du -h "$folder"/incipit "$folder"/*-tests
echo "compressed, all together: $(tar -C "$folder" -czf - incipit kernels-tests model-tests nccl-tests | wc -c | numfmt --to=iec)"
