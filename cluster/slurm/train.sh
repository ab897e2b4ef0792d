#!/usr/bin/env bash
# Trains a prompt on the workers that Slurm runs, from a login node:
#
#   ./train.sh NAME MODEL [flags of `incipit job submit`]
#   TP=2 ./train.sh boolq t5-xl --train train.jsonl --eval dev.jsonl --steps 2000
#
# MODEL is a directory under $INCIPIT_MODELS. Ctrl-C leaves the job running; the same command again goes on watching it.
set -euo pipefail

name=${1:?name of the job} model=${2:?directory of the model, under INCIPIT_MODELS}
shift 2
home=${INCIPIT_HOME:-$HOME/incipit}
incipit=${INCIPIT:-incipit}
models=${INCIPIT_MODELS:-$home/models}

INCIPIT_COORDINATOR=$(cat "$home/endpoint")
INCIPIT_CA=$home/coordinator/tls/ca.pem
# The first token may do everything. Give other people tokens of their own (`incipit coordinator token`).
INCIPIT_TOKEN=${INCIPIT_TOKEN:-$(cat "$home/admin.token")}
export INCIPIT_COORDINATOR INCIPIT_CA INCIPIT_TOKEN

# One backbone for each model, kept for the jobs to come. Its name may have small letters, digits and dashes.
backbone=$(basename "$model" | tr 'A-Z_.' 'a-z--')
if ! "$incipit" backbone get "$backbone" >/dev/null 2>&1; then
  # gloo: ranks on several nodes without GPUs. With GPUs: COLLECTIVE=nccl, DEVICE=cuda.
  "$incipit" backbone create --name "$backbone" --model "$models/$model" --device "${DEVICE:-cpu}" \
    --tp "${TP:-1}" --dp "${DP:-1}" --collective "${COLLECTIVE:-gloo}"
fi
if ! "$incipit" job get "$name" >/dev/null 2>&1; then
  "$incipit" job submit --name "$name" --backbone "$backbone" "$@"
fi
exec "$incipit" job watch "$name"
