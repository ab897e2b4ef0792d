#!/usr/bin/env bash
# Builds Incipit and shows it at work: tunes a prompt for a small bundled model in about a minute. Installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
cargo build --release --locked --bin incipit
exec target/release/incipit demo "$@"
