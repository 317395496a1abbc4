"""Every shipped recipe for two steps a stage, on a tiny random teacher of its family with as many layers as its pattern."""

import json
import math
import re

import pytest
import torch

from distill import run
from distill.recipe_file import check, load
from distill.shipped import shipped_folder
from distill.stages import stage_class
from tests.distill.chat_templates import TINY
from tests.teachers.tiny import tiny_model

NAMES = sorted(path.stem for path in shipped_folder().glob("*.yaml"))
SEQ_LEN, BATCH = 32, 2
CHATS_LEN = 96  # where a stage reads chats
STEPS = 2


def snapshot(reference):
    """The config snapshot of a recipe's teacher."""
    return re.sub(r"([.-]q\d\w*)?\.gguf$", "", reference.rpartition("/")[2].lower())


def shrunk(options, seq_len, chats):
    """A stage's options with two steps of the smallest batches; learning rates stay. Its own text becomes chats."""
    kept = {key: value for key, value in options.items() if key not in ("batch", "micro_batch")}
    kept |= {"tokens": STEPS * BATCH * seq_len} | ({"data": [{"path": str(chats)}]} if options.get("data") else {})
    return kept | ({"calibration_tokens": 64} if "calibration_tokens" in options else {})


def sizes(entries):
    """As many layers as the pattern has, or a selection needs; as published, and as many heads, where heads are named."""
    if isinstance(entries["pattern"], dict):
        return {"num_hidden_layers": 3}
    replaced = [options["replace"]["pattern"] for options in entries["stages"] if "replace" in options]
    longest = max([len(entries["pattern"]), *(len(one) if isinstance(one, str) else 4 for one in replaced)])
    if not any("keep" in options for options in entries["mixers"].values()):
        blocks = max(options.get("blocks", 1) for options in entries["mixers"].values())
        windows = [options.get("window") for options in entries["mixers"].values()]
        window = max([1, *(size for size in windows if isinstance(size, int))])
        return {
            "num_hidden_layers": max(blocks * longest, 2),
            "max_position_embeddings": max(256, window) + entries["meta_tokens"],
        }
    config = json.loads((shipped_folder() / "configs" / f"{snapshot(entries['teacher'])}.json").read_text())
    same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {key: config[key] for key in same} | {"hidden_size": 8 * config["num_attention_heads"]}


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, tmp_path, tokenizer, text_files):
    entries = load(name).model_dump(mode="json")
    torch.manual_seed(2)
    tiny_model(snapshot(entries["teacher"]), vocab_size=320, **sizes(entries)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "chat_template.jinja").write_text(TINY)
    said = [[{"role": "user", "content": f"what {n}?"}, {"role": "assistant", "content": f"the sea {n}"}] for n in range(40)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in said))
    own = any(options.get("data") for stage in entries["stages"] for options in stage.values())
    seq_len = CHATS_LEN if own else SEQ_LEN
    data = {part: [{"path": str(text_files / f"{part}.jsonl")}] for part in ("train", "heldout")}
    stages = [{kind: shrunk(options, seq_len, chats) for kind, options in stage.items()} for stage in entries["stages"]]
    if isinstance(entries["pattern"], dict):
        entries["pattern"] |= {"keep": 2, "window": 8, "sinks": 1, "length": 128, "trials": 1, "tokens": 64}
    entries |= {
        "teacher": str(tmp_path / "teacher"),
        "data": {**data, "seq_len": seq_len, "batch": BATCH},
        "stages": stages,
        "evaluation": {"tokens": 64, "probe_tokens": 32, "passkey": [64], "passkey_trials": 1},
        "export": [],
        "twin": False,
        "device": "cpu",
    }
    finished = run(check(entries, name), runs=tmp_path / "runs")
    trained = [kind for stage in stages for kind in stage if stage_class(kind).trains]
    steps = [line["stage"] for line in finished.metrics()]
    assert all(steps.count(kind) == STEPS * trained.count(kind) for kind in trained), steps
    assert all(math.isfinite(line["loss"]) for line in finished.metrics())
