#!/usr/bin/env bash
# Generation at SmolLM2-135M's shape: the teacher and students with windows beside states, after 1k to 32k tokens.
# Needs: one GPU; weights are random, so no checkpoint and no text.
# Ran on one H100 80GB at commit 6dce722, 27 November 2026: docs/performance.md.
# Usage: bash docs/runs/generation-135m.sh
set -eu
distill bench generation --recipe smollm2-135m_window-hybrid \
    --variant "windows beside states, no attention: pattern=M" \
    --lengths 1k,4k,32k --protocol mamba
