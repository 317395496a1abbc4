#!/usr/bin/env bash
# The chats of docs/instruct.md, from public sets of questions with reference answers (docs/text.md lists them).
# Needs: TRAIN, a folder with cotqa-00.jsonl.xz and medqa-00.jsonl.xz; HELDOUT, one with gsm8k_test.jsonl.xz. No GPU; seconds.
# Usage: bash docs/runs/instruct/data.sh TRAIN HELDOUT OUT
# GSM8K's own rows are left out of the training chats, because the held-out chats are GSM8K's.
set -eu
train=$1 heldout=$2 out=$3
mkdir -p "$out"
distill questions "$train/cotqa-00.jsonl.xz" --leave-out gsm8k --out "$out/questions.jsonl"
distill questions "$train/medqa-00.jsonl.xz" --out "$out/medical.jsonl"
distill questions "$heldout/gsm8k_test.jsonl.xz" --out "$out/gsm8k.jsonl"
head -n 4000 "$out/questions.jsonl" > "$out/for-pairs.jsonl"  # questions that no stage before DPO reads
tail -n +4001 "$out/questions.jsonl" > "$out/for-training.jsonl"
