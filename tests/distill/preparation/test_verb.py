"""`distill prepare`: its progress, the texts that it prepares, and its memory."""

import json
import os
import subprocess
import sys

import pytest

import distill
from distill.errors import UserError
from distill.text import preparation, progress
from distill.text.prepared import load


@pytest.mark.parametrize(
    ("tokens", "begun", "limit", "share", "seconds", "said"),
    [
        (5_000, 0, 20_000, None, 10, "5,000 tokens of 7 documents prepared, 500 tokens/s, 30 s left"),
        (5_000, 3_000, 20_000, 0.5, 10, "200 tokens/s, 25 s left"),
        (5_000, 0, None, 0.01, 10, "500 tokens/s, 16 min left"),
        (5_000, 0, None, 0.001, 10, "500 tokens/s, 2.8 h left"),
        (5_000, 0, None, None, 10, "500 tokens/s"),
        (5_000, 5_000, None, 0.5, 10, "0 tokens/s"),
    ],
)
def test_progress(tokens, begun, limit, share, seconds, said):
    line, _ = progress.TextProgress("data.train", begun, limit, None).line(tokens, 7, share, seconds)
    assert line.endswith(said) if "left" in said or said.endswith("tokens/s") else line == said


def test_progress_as_lines(prepared, sources, monkeypatch, capsys):
    monkeypatch.setattr(progress, "TICKS", 0.0)
    prepared(sources["local"], "cache")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 100 and all(line.startswith("data.train: ") and "tokens/s" in line for line in lines)


def test_the_verb(tiny_recipe, tmp_path, monkeypatch):
    """Prepares every text of a recipe without its teacher's weights; a run prepares nothing after it."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "the river runs on " * 400}))
    tiny_recipe["stages"][3]["imitate"] |= {"data": [{"path": str(tmp_path / "own.jsonl")}], "seq_len": 64}
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *given, **options: pytest.fail("loaded"))
        made = distill.prepare(tiny_recipe, processes=2)
    assert list(made) == ["data.heldout", "data.train", "stages.3.imitate.data"]
    for facts in made.values():
        text = load(type(tmp_path)(facts["folder"]))
        assert (text.tokens, len(text.shards), text.meta.sha256) == (facts["tokens"], facts["shards"], facts["sha256"])
    assert list(made["stages.3.imitate.data"]["windows"]) == ["64"]
    monkeypatch.setattr(preparation, "_write", lambda *given: pytest.fail("prepared again"))
    distill.run(tiny_recipe, runs=tmp_path / "runs")
    for processes in (0, 1025):
        with pytest.raises(UserError, match="processes is"):
            distill.prepare(tiny_recipe, processes=processes)


MEASURED = """
import json, random, resource, sys
from transformers import AutoTokenizer
from distill.recipe import TextSource
from distill.text.preparation import Tokenising, prepare
folder, teacher, tokens, processes = sys.argv[1:]
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokenizer, chance = AutoTokenizer.from_pretrained(teacher), random.Random(1)
words = ["river", "the", "runs", "on", "and", "over", "stones", "to", "sea", "a", "valley", "lies", "below"]
rows = [" ".join(chance.choices(words, k=chance.randint(50, 900))) for _ in range(60)]
each = sum(len(ids) for ids in tokenizer(rows)["input_ids"])
for name, count in (("little", 1), ("much", -(-int(tokens) // each))):
    with open(f"{folder}/{name}.jsonl", "w") as file:
        for turn in range(count):
            file.writelines(json.dumps({"text": f"{turn} {row}"}) + "\\n" for row in rows)
options = {"separator": None, "seed": 0, "limit": None, "where": "x", "how": Tokenising(int(processes))}
prepare([TextSource(path=f"{folder}/little.jsonl")], tokenizer, **options)
before = most()
made = prepare([TextSource(path=f"{folder}/much.jsonl")], tokenizer, **options)
print(most() - before, json.loads((made / "meta.json").read_text())["tokens"])
"""


def test_memory(tmp_path, tiny_teacher):
    """Two million tokens of made-up text add at most 200 MiB to the process."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(tiny_teacher), "2000000", "2"]
    environment = os.environ | {"DISTILL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    taken, tokens = map(int, done.stdout.split())
    assert tokens >= 2_000_000 and taken < 200 * 2**20, f"{taken / 2**20:.0f} MiB for {tokens:,} tokens"
