#!/usr/bin/env bash
# Training steps of Llama-3-8B's shape with AdamW's moments in 8 bits: tokens/s and memory of align and of imitate.
# Needs: one GPU of 80 GB and torchao (extra int8); weights are random, so no checkpoint and no text.
# Ran on one H100 80GB at commit c421f60, 28 November 2026: docs/performance.md.
# Usage: bash docs/runs/steps-8b-eight-bits.sh
set -eu
distill bench steps --no-references --recipe llama-3-8b_mamba-in-llama pattern=MA 'stages=[{initialise: {tokens: 1M}},
  {align: {tokens: 100M, lr: 1e-4, micro_batch: 4, batch: 16, optimizer: adamw_8bit}},
  {imitate: {tokens: 1.9B, lr: 8e-5, train: mixers+norms, micro_batch: 1, batch: 8, activation_checkpointing: true, optimizer: adamw_8bit}},
  {imitate: {tokens: 1.9B, lr: 8e-5, train: mixers+norms, micro_batch: 4, batch: 16, activation_checkpointing: true, optimizer: adamw_8bit}}]'
