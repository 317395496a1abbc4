#!/usr/bin/env bash
# Generation at Llama-3.2-1B's shape after 64k and 128k tokens: Samba, Griffin and Mamba, which convert every layer.
# Needs: one GPU of 80 GB; weights are random, so no checkpoint and no text.
# Ran on one H100 80GB at commit 0234fd3, 27 November 2026: docs/performance.md.
# Usage: bash docs/runs/generation-systems-1b.sh
set -eu
distill bench generation --recipe llama-3.2-1b_samba \
    --variant "Griffin: pattern=RRW; mixers={R: {mixer: rg_lru}, W: {mixer: attention, window: 1024}}" \
    --variant "Mamba: pattern=M; mixers={M: {mixer: mamba1}}" \
    --lengths 64k,128k
