#!/usr/bin/env bash
# Training steps of Llama-3.2-1B's shape on PROCESSES GPUs of one host: tokens/s, memory and losses.
# Needs: PROCESSES GPUs of 80 GB; weights are random, so no checkpoint and no text. `shard=student` shards the student's masters.
# Ran on one, two and four H100 80GB of one host at commit 1ad9514, 27 November 2026: docs/scaling.md.
# Usage: bash docs/runs/steps-1b-gpus.sh 4 [OVERRIDE...]
set -eu
processes=${1:?usage: bash docs/runs/steps-1b-gpus.sh PROCESSES [OVERRIDE...]}
shift
torchrun --nproc-per-node "$processes" -m distill.cli bench steps --no-references --recipe llama-3.2-1b_mamba2-hybrid \
    stages.imitate.activation_checkpointing=false "$@"
