#!/usr/bin/env bash
# What must hold besides the tests: format, lints, documentation, licences and sources of dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
need_gloo

DENY_VERSION=0.20.2
if ! cargo deny --version 2>/dev/null | grep -q "$DENY_VERSION"; then
  [ "${INCIPIT_NO_INSTALL:-0}" = 1 ] && { echo "check: cargo-deny $DENY_VERSION is missing" >&2; exit 1; }
  # It runs for a second; as its authors release it, linked as one piece, it takes many minutes to build.
  cargo install --quiet --locked --debug cargo-deny --version "$DENY_VERSION"
fi

cargo fmt --all --check
# The style of the interface.
need_buf
"$BUF" lint proto
cargo clippy --workspace --all-targets --locked ${FEATURES[@]+"${FEATURES[@]}"} -- -D warnings
# As it is built without Gloo, too.
cargo clippy -p incipit-cli --all-targets --locked -- -D warnings
# For GPUs: compiled, linked and linted; nothing of it runs without one. INCIPIT_NO_CUDA=1 leaves it out.
if [ "${INCIPIT_NO_CUDA:-0}" != 1 ]; then
  scripts/gpu/build-check.sh
fi
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet ${FEATURES[@]+"${FEATURES[@]}"}
# Advisories need a database from the network: `cargo deny check advisories` where there is one.
cargo deny --locked check bans licenses sources
