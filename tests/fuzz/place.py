"""A folder with everything that the command line reads: recipes, a finished and a stopped run, an export, teachers, text."""

import gzip
import json
import lzma
import os
from pathlib import Path

import yaml

ANSWERS = ["answers", "text.yaml", "--data", "text/chats.jsonl", "--out", "said", "--tokens", "4", "--unfinished"]
# The commands that make the runs, and the exit status of each; so little time stops a run after one step.
RUNS = [
    (["run", "short.yaml"], 0),
    (["run", "half.yaml", "--stop-after", "1e-7"], 3),
    (["run", "half.yaml", "--stop-after", "1e-7"], 3),
    (["run", "every.yaml"], 0),
    (["export", "@short", "--out", "out", "--no-verify"], 0),
    ([*ANSWERS, "--limit", "4"], 0),
    (["cache", "cached.yaml", "--out", "logits", "--top-k", "8"], 0),
]
SENTENCES = [
    "The river carries sand and silt down to the wide plain.",
    "A small engine turned all night in the empty hall.",
    "Nobody knew why the old clock had stopped at four.",
    "She counted the birds on the wire and wrote the number down.",
    "Every answer in the book was copied from another book.",
]


def documents(count: int, start: int = 0) -> list[str]:
    """Texts of some hundred characters, all different."""
    return [
        " ".join(SENTENCES[(n * k + k) % len(SENTENCES)] + f" This was line {n}." for k in range(1, 6))
        for n in range(start, start + count)
    ]


STAGES = [{"initialise": {"tokens": 64}}, {"align": {"tokens": 96, "lr": 1e-3}}]
CACHED = {"imitate": {"tokens": 64, "lr": 1e-3, "offline_logits": "logits"}}
CHATS, PAIRS = [{"path": "text/chats.jsonl"}], [{"path": "text/pairs.jsonl"}]
CHAT_STAGES = [
    {"initialise": {"tokens": 64}},
    {"imitate": {"tokens": 64, "lr": 1e-3, "train": "mixers", "data": CHATS}},
    {"replace": {"layers": [0], "tokens": 64}},
    {"align": {"tokens": 64, "lr": 1e-3, "layers": "new"}},
    {"tune": {"tokens": 64, "lr": 1e-3, "data": CHATS}},
    {"prefer": {"tokens": 64, "lr": 1e-3, "data": PAIRS}},
]


def recipe(name: str, **changes) -> dict:
    """A recipe for the tiny teacher that is over in two seconds; paths are relative, so that a copy of the place works."""
    return {
        "name": name,
        "teacher": "./teacher",
        "pattern": "AM",
        "mixers": {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}},
        "data": {
            "train": [{"path": "text/train.jsonl"}],
            "heldout": [{"path": "text/heldout.jsonl"}],
            "seq_len": 16,
            "batch": 2,
        },
        "stages": STAGES,
        "evaluation": {"tokens": 64, "probe_tokens": 32, "passkey": [64], "passkey_trials": 1},
        "device": "cpu",
        "checkpoints": {"steps": 1},
        **changes,
    }


def make(folder: Path) -> None:
    """Fill an empty folder; the working directory is then the folder. To be called in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    _text()
    tokenizer = _tokenizer()
    _teacher(tokenizer)
    small_gguf("tiny.gguf")
    _recipes()
    _outside()


def _text() -> None:
    Path("text").mkdir()
    rows = [{"source": "book", "text": text} for text in documents(16)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("text/train.jsonl").write_text(lines)
    Path("text/heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(6, 40)))
    Path("text/plain.txt").write_text("\n\n".join(documents(12)))
    Path("text/table.csv").write_text("text,source\n" + "".join(f'"{text}",book\n' for text in documents(12)))
    Path("text/list.json").write_text(json.dumps(rows))
    with gzip.GzipFile("text/train.jsonl.gz", "wb", mtime=0) as file:
        file.write(lines.encode())
    with lzma.open("text/train.jsonl.xz", "wb") as file:
        file.write(lines.encode())
    import pyarrow
    import pyarrow.parquet
    import zstandard

    Path("text/train.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents(12)}), "text/train.parquet")
    Path("set").mkdir()
    Path("set/train.jsonl").write_text(lines)
    Path("set/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\nA data set.\n")
    _chats()
    Path("tasks").mkdir()
    items = [{"ctx": f"item {n}", "choices": [f"{n} a", f"b {n} c"], "label": n % 2} for n in range(4)]
    for task in ("piqa", "hellaswag"):
        Path(f"tasks/{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def _chats() -> None:
    """Chats, pairs of answers, and questions with reference answers."""
    asked = [f"What was line {n}?" for n in range(12)]
    chats = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": f"It was {n}."}]}
        for n, one in enumerate(asked)
    ]
    pairs = [{"prompt": one, "chosen": f"It was {n}.", "rejected": "Nobody knows."} for n, one in enumerate(asked)]
    questions = [{"id": str(n), "question": one, "answer": f"It was so. #### {n}"} for n, one in enumerate(asked)]
    for name, rows in (("chats", chats), ("pairs", pairs), ("questions", questions)):
        Path(f"text/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train(["text/train.jsonl"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def _teacher(tokenizer) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    model.save_pretrained("sharded", max_shard_size="20KB")
    tokenizer.save_pretrained("sharded")


def small_gguf(path: str | Path) -> None:
    """Write a GGUF file of fifty kilobytes."""
    from tests.teachers import gguf_cases, gguf_files

    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = gguf_cases.SIZES | small | {"rope_parameters": gguf_cases.plain(1e5), "tie_word_embeddings": True}
    case = gguf_cases.Case("llama", "llama", config, {"rope.dimension_count": 16})
    gguf_files.write(case, gguf_files.random_model(case), path, "F16")


def _recipes() -> None:
    entries = {name: recipe(name) for name in ("short", "half")}  # the finished and the stopped run's
    entries["gguf"] = recipe("gguf", teacher="./tiny.gguf")
    entries["sharded"] = recipe("sharded", teacher="./sharded")
    entries["text"] = recipe("text")
    entries["chat"] = recipe("chat", stages=CHAT_STAGES)
    entries["chat"]["data"] |= {"seq_len": 48}
    entries["begun"] = recipe("begun", student="./out", stages=[{"imitate": {"tokens": 64, "lr": 1e-3}}])
    for key in ("pattern", "mixers"):
        del entries["begun"][key]
    entries["cached"] = recipe("cached", stages=[*STAGES, CACHED])
    entries["every"] = recipe(
        "every",
        pattern={"by": "recall", "keep": 1, "rest": "M"},
        stages=[
            {"initialise": {"tokens": 64}},
            {"orient": {"tokens": 64, "lr": 1e-3, "calibration_tokens": 32}},
            {"align": {"tokens": 64, "lr": {"new": 5e-3, "ssm": 5e-3, "window": 1e-3}}},
            {"imitate": {"tokens": 64, "lr": 1e-3, "train": "mixers"}},
        ],
        twin=True,
        export=["portable"],
        seed=1,
    )
    for name, content in entries.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _outside() -> None:
    """What lies beside the run folders and the cache, and what nothing may touch."""
    Path("outside/folder").mkdir(parents=True)
    for name in ("secret.txt", "folder/secret.json", "model.safetensors", "report.html"):
        Path("outside", name).write_text("a secret\n")
