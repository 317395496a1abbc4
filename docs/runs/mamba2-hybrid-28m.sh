#!/usr/bin/env bash
# SmolLM2-135M, stock Mamba-2 in 22 of 30 layers: 27.8M tokens.
# Needs: TEACHER, the file SmolLM2-135M-Instruct.Q4_1.gguf; FOLDER/train/*.jsonl.xz and FOLDER/heldout/*.jsonl.xz.
# Ran on one H100 80GB, 25 November 2026, 842 s in two calls, the first with `--stop-after 8.7`: LOG.md.
# Usage: bash docs/runs/mamba2-hybrid-28m.sh TEACHER FOLDER [--stop-after 8.7]
set -eu
teacher=${1:?usage: bash docs/runs/mamba2-hybrid-28m.sh TEACHER FOLDER [OPTION...]}
folder=${2:?usage: bash docs/runs/mamba2-hybrid-28m.sh TEACHER FOLDER [OPTION...]}
shift 2
distill run smollm2-135m_mamba2-hybrid "teacher=$teacher" \
    "data.train=[{path: \"$folder/train/*.jsonl.xz\"}]" "data.heldout=[{path: \"$folder/heldout/*.jsonl.xz\"}]" \
    stages.orient.tokens=524288 stages.align.tokens=12582912 stages.imitate.tokens=14680064 \
    stages.imitate.micro_batch=8 checkpoints.minutes=60 "$@"
