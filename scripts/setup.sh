#!/usr/bin/env bash
# Installs what building and testing Incipit needs and this machine lacks. Sourced by the other scripts; safe to run alone.
#
# Needed: a C compiler and linker, and rustup's cargo (rust-toolchain.toml says which version). Everything else comes from
# the crate registry. Ranks as processes (the feature `gloo`) need a C++ compiler and the Gloo library besides: `need_gloo`
# installs them. With INCIPIT_NO_INSTALL=1 nothing is installed, and what is missing is an error.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }

install_packages() {
  if [ "${INCIPIT_NO_INSTALL:-0}" = 1 ]; then
    echo "setup: missing: $* (INCIPIT_NO_INSTALL=1 forbids installing it)" >&2
    exit 1
  fi
  local sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo"
  echo "setup: installing $*" >&2
  if have apt-get; then
    $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
  elif have dnf; then
    $sudo dnf install -y -q "${@/libc6-dev/glibc-devel}"
  elif have brew; then
    brew install "${@/libc6-dev/}"
  else
    echo "setup: no apt-get, dnf or brew here; install by hand: $*" >&2
    exit 1
  fi
}

if [ -d "$HOME/.cargo/bin" ]; then
  export PATH="$HOME/.cargo/bin:$PATH"
fi
have cc || install_packages gcc libc6-dev

# Sets FEATURES to what cargo is told so that all is built and tested that this machine can: ranks as processes where a package of
# Gloo is known, and the CUDA kernels on the emulator, which needs the C++ compiler alone.
need_gloo() {
  local emulator=incipit-kernels/emulator,incipit-tests/emulator
  FEATURES=(--features "incipit-cli/gloo,incipit-tests/gloo,$emulator")
  if [ -e /usr/include/gloo/config.h ] && have c++; then
    return
  fi
  if have apt-get; then
    install_packages g++ libgloo-dev
  else
    echo "setup: no package of Gloo is known here: ranks as processes are neither built nor tested" >&2
    FEATURES=(--features "$emulator")
  fi
}

# What the tests of cluster/ and examples/python need: kubectl, linters and gRPC for Python, in a Python environment of their own. Sets
# INCIPIT_CLUSTER_TOOLS, unless it is set. Tests that do not find them say that they were skipped.
need_cluster_tools() {
  [ -z "${INCIPIT_CLUSTER_TOOLS:-}" ] || return 0
  export INCIPIT_CLUSTER_TOOLS="$PWD/target/cluster-tools"
  local lists=(tests/manifests/requirements.txt examples/python/requirements.txt) made="$INCIPIT_CLUSTER_TOOLS/made-of"
  if [ "$(cat "$made" 2>/dev/null)" = "$(cat "${lists[@]}")" ] || [ "${INCIPIT_NO_INSTALL:-0}" = 1 ]; then
    return
  fi
  python3 -c 'import ensurepip' 2>/dev/null || install_packages python3 python3-venv
  echo "setup: fetching what the tests of cluster/ need into $INCIPIT_CLUSTER_TOOLS" >&2
  rm -rf "$INCIPIT_CLUSTER_TOOLS"
  if python3 -m venv "$INCIPIT_CLUSTER_TOOLS" &&
    "$INCIPIT_CLUSTER_TOOLS/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: "${lists[@]/#/--requirement=}"; then
    cat "${lists[@]}" >"$made"
  else
    echo "setup: that failed: cluster/ and examples/python are not fully tested" >&2
  fi
}

# Sets BUF to the linter of the interface's files, of a version, which npm has for each kind of machine.
need_buf() {
  local version=1.75.0 kind
  case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) kind=linux-x64 ;;
    Linux-aarch64) kind=linux-aarch64 ;;
    Darwin-arm64) kind=darwin-arm64 ;;
    *) echo "setup: no buf is known for this machine: $(uname -sm)" >&2; return 1 ;;
  esac
  BUF="$PWD/target/buf-$version/node_modules/@bufbuild/buf-$kind/bin/buf"
  [ -x "$BUF" ] && return
  [ "${INCIPIT_NO_INSTALL:-0}" = 1 ] && { echo "setup: buf $version is missing" >&2; return 1; }
  have npm || install_packages npm
  npm install --silent --no-save --no-audit --no-fund --prefix "target/buf-$version" "@bufbuild/buf-$kind@$version" >&2
}

# `ip`, with which the chaos test makes machines of a network.
need_ip() {
  if ! have ip && have apt-get && [ "$(id -u)" = 0 ] && [ "${INCIPIT_NO_INSTALL:-0}" != 1 ]; then
    install_packages iproute2
  fi
}

# Slurm's daemons, for the tests of cluster/slurm. They are not started, but by those tests, on ports and in folders of their own.
need_slurm() {
  if ! { have slurmctld || [ -x /usr/sbin/slurmctld ]; } && have apt-get && [ "$(id -u)" = 0 ] && [ "${INCIPIT_NO_INSTALL:-0}" != 1 ]; then
    install_packages slurmctld slurmd slurm-client munge
  fi
}

if ! have cargo; then
  echo "setup: cargo is missing; install rustup from your package manager or https://rustup.rs, then run this again" >&2
  exit 1
fi
