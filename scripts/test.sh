#!/usr/bin/env bash
# Runs every test: the quick ones, then the long suites by name. Installs what is missing first.
#
#   ./scripts/test.sh            all
#   ./scripts/test.sh quick      without the long suites
#
# INCIPIT_SHARED names a folder with a larger model and labelled data (models/t5-mini-lm, data/trec, ...); tests that need
# them say that they were skipped where it is absent. INCIPIT_PYTHON names a Python that has the packages of
# scripts/goldens/requirements.txt; the checks against the live reference libraries are skipped without it. With
# INCIPIT_REQUIRE_ALL=1 tests of clusters fail, and are not skipped, where Slurm or their other programs cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
need_gloo

if [ -z "${INCIPIT_SHARED:-}" ] && [ -d ../shared/models ]; then
  INCIPIT_SHARED="$(cd ../shared && pwd)"
  export INCIPIT_SHARED
fi

cargo test --workspace --locked ${FEATURES[@]+"${FEATURES[@]}"}
if [ "${1:-all}" != quick ]; then
  need_cluster_tools
  need_slurm
  need_ip
  # The long suites: tests that are marked `#[ignore = "long: ..."]`.
  cargo test --workspace --locked ${FEATURES[@]+"${FEATURES[@]}"} -- --ignored
fi
