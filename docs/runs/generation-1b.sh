#!/usr/bin/env bash
# Generation at Llama-3.2-1B's shape: the teacher and five students, after 2k to 128k tokens, and the protocol of Mamba's paper.
# Needs: one GPU of 80 GB; weights are random, so no checkpoint and no text.
# Ran on one H100 80GB at commit 6dce722, 27 November 2026: docs/performance.md.
# Usage: bash docs/runs/generation-1b.sh
set -eu
distill bench generation --recipe llama-3.2-1b_mamba2-hybrid mixers.M.mixer=discrete_mamba2 \
    --variant "25 % stock Mamba-2: mixers.M.mixer=mamba2" \
    --variant "25 % discrete beside windows: mixers.M={mixer: discrete_mamba2, window: {size: 64, sinks: 4, own: true, lag: true, gate: true}}" \
    --variant "25 % gated DeltaNet: mixers.M={mixer: gated_deltanet}" \
    --variant "no attention, discrete: pattern=M" \
    --lengths 2k,16k,64k,128k --protocol mamba
