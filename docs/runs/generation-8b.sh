#!/usr/bin/env bash
# Generation at Llama-3-8B's shape: the teacher and two students that keep half of the layers, after 2k to 128k tokens.
# Needs: one GPU of 80 GB; weights are random, so no checkpoint and no text.
# The recipe kept every second layer as attention when the table was measured. It converts more layers now. For the layout of the
# table, call: generation-8b.sh pattern=MA 'stages=[{initialise: {tokens: 1M}}]'
# Ran on one H100 80GB at commit 6dce722, 27 November 2026: docs/performance.md.
# Usage: bash docs/runs/generation-8b.sh [OVERRIDE...]
set -eu
distill bench generation --recipe llama-3-8b_mamba-in-llama \
    --variant "25 % discrete: mixers.M={mixer: discrete_mamba2}" \
    --lengths 2k,64k,128k "$@"
