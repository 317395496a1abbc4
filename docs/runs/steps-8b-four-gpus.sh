#!/usr/bin/env bash
# Training steps of Llama-3-8B's shape with `train: all` on four GPUs. The arguments: windows at a time (MICRO_BATCH) and batch size (BATCH).
# Needs: four GPUs of 80 GB; weights are random, so no checkpoint and no text.
# Ran on four H100 80GB of one host, 27 November 2026: arguments 1 and 16 at commit 1ad9514, 4 and 32 at a2f9bd2: docs/scaling.md.
# Usage: bash docs/runs/steps-8b-four-gpus.sh 4 32
set -eu
micro_batch=${1:?usage: bash docs/runs/steps-8b-four-gpus.sh MICRO_BATCH BATCH}
batch=${2:?usage: bash docs/runs/steps-8b-four-gpus.sh MICRO_BATCH BATCH}
torchrun --nproc-per-node 4 -m distill.cli bench steps --no-references --recipe llama-3-8b_mamba-in-llama pattern=MA \
    "stages=[{initialise: {tokens: 1M}}, {imitate: {tokens: 1.9B, lr: 8e-5, train: all, micro_batch: $micro_batch, batch: $batch,
      activation_checkpointing: true}}]"
