#!/usr/bin/env bash
# SmolLM2-135M, stock Mamba-2 in 22 of 30 layers: 7.3M tokens.
# Needs: TEACHER, the file SmolLM2-135M-Instruct.Q4_1.gguf; FOLDER/train/*.jsonl.xz and FOLDER/heldout/*.jsonl.xz.
# Ran on one H100 80GB, 25 November 2026, about eight minutes: LOG.md.
# Usage: bash docs/runs/mamba2-hybrid-7m.sh TEACHER FOLDER
set -eu
teacher=${1:?usage: bash docs/runs/mamba2-hybrid-7m.sh TEACHER FOLDER}
folder=${2:?usage: bash docs/runs/mamba2-hybrid-7m.sh TEACHER FOLDER}
distill run smollm2-135m_mamba2-hybrid "teacher=$teacher" \
    "data.train=[{path: \"$folder/train/*.jsonl.xz\"}]" "data.heldout=[{path: \"$folder/heldout/*.jsonl.xz\"}]" \
    stages.orient.batch=4 stages.orient.tokens=524288 stages.align.tokens=3670016 \
    stages.imitate.tokens=3145728 stages.imitate.micro_batch=8 checkpoints.minutes=60
