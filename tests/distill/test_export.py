"""The portable export loads in an environment without this project, and computes the same there."""

import json
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

import distill
from distill import run
from distill.errors import UserError
from distill.exporters.portable import flattened
from distill.recipe_file import check
from students.mixers import MIXERS as TABLE
from tests.conftest import tiny_entries

# Runs without this project on the path (no site, so no editable install) and without the packages that ABSENT names.
ALONE = """
import importlib.abc, importlib.util, json, os, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in os.environ["ABSENT"].split():
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
assert not any(importlib.util.find_spec(name) for name in ("students", "teachers", "distill"))
"""
ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
    padded = torch.cat([torch.zeros(len(ids), 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
if "--no-tokenizer" not in sys.argv:
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).decode(ids[0])
print(json.dumps({"logits": logits.tolist(), "tokens": tokens.tolist(), "left": left[:, 3:].tolist()}))
"""

MIXERS = {
    "discrete windowed": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2, "gate": True}},
    "stock": {"mixer": "mamba2"},
    "mamba": {"mixer": "mamba1"},
    "griffin": {"mixer": "rg_lru"},
    "gated DeltaNet": {"mixer": "gated_deltanet"},
    "shared": {"mixer": "shared_attention", "rank": 2},
    "split heads": {"mixer": "split_heads", "keep": {1: [0], "default": [2, 3]}},
    "parallel heads behind meta tokens": {"mixer": "parallel_heads", "window": 4, "sinks": 3},
}
MIXERS |= {name: {"mixer": name} for name in TABLE if name not in {options["mixer"] for options in MIXERS.values()}}


WITHOUT = {"ABSENT": "jaxtyping beartype datasets triton"}
TRAINED = {"ABSENT": "jaxtyping beartype triton"}  # Trainer imports datasets
WITH_KERNELS = {"ABSENT": "jaxtyping beartype datasets", "DISTILL_KERNELS": "triton", "TRITON_INTERPRET": "1"}


@pytest.mark.parametrize(
    ("mixer", "setting"),
    [*((mixer, WITHOUT) for mixer in MIXERS), ("stock", WITH_KERNELS)],
    ids=[*MIXERS, "stock on its kernels"],
)
def test_portable_elsewhere_is_the_same_student(mixer, setting, tiny_teacher, text_files, tmp_path):
    entries = tiny_entries(tiny_teacher, text_files)
    entries |= {"mixers": {"M": MIXERS[mixer]}, "stages": [{"initialise": {"tokens": 64}}]}
    if "meta tokens" in mixer:
        entries |= {"meta_tokens": 3, "stages": [*entries["stages"], {"imitate": {"tokens": 128, "lr": 1e-3}}]}
    folder = run(check(entries, "here"), runs=tmp_path)
    out = distill.export(folder.path, to="portable", out=tmp_path / "a folder" / "portable", dtype="float32")
    ids = torch.randint(1, 320, (2, 21))
    found = elsewhere(out, ids, tmp_path, setting)

    import students

    student = students.load(folder.student).eval()
    with torch.no_grad():
        difference = (torch.tensor(found["logits"]) - student(ids).logits).abs().max().item()
        assert difference < 2e-5  # float32, another number of threads
        tokens = student.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found["tokens"] == tokens.tolist() == found["left"]


def elsewhere(folder, ids, scratch, setting, *flags):
    return isolated(ELSEWHERE, [str(folder), json.dumps(ids.tolist()), *flags], scratch, setting)


def isolated(script, arguments, scratch, setting):
    """The JSON that a script prints in a process which does not know this project."""
    command = [sys.executable, "-S", "-c", ALONE + script, *arguments]
    environment = {
        "PYTHONPATH": sysconfig.get_paths()["purelib"],
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    } | setting
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_the_code_needs_only_torch_and_transformers(tmp_path):
    """By transformers' own reading of imports: what it finds missing, it refuses to load."""
    from transformers.dynamic_module_utils import get_imports

    for name, source in flattened().items():
        (tmp_path / name).write_text(source)
        assert set(get_imports(tmp_path / name)) <= {"torch", "transformers"} | set(sys.stdlib_module_names), name


def test_what_export_refuses(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="no export target 'portabel'; did you mean 'portable'"):
        distill.export(tmp_path, to="portabel", out=tmp_path / "out")
    with pytest.raises(UserError, match="is no run folder"):
        distill.export(tmp_path, out=tmp_path / "out")
    from distill.runs.run_dir import RunDir

    folder = RunDir.open(check(tiny_recipe, "here"), tmp_path, fresh=False)
    with pytest.raises(UserError, match="has no finished student yet"):
        distill.export(folder.path, out=tmp_path / "out")
    folder.student.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="is not empty"):
        distill.export(folder.path, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


AGAIN = """
import copy, json, os, pickle, shutil, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

first, scratch = sys.argv[1], sys.argv[2]
ids = torch.tensor(json.loads(sys.argv[3]))
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
found = {}
with torch.no_grad():
    model = load(first)
    found["first"] = model(ids).logits.tolist()
    model.save_pretrained(scratch + "/second")
    for name, again in (("copied", copy.deepcopy(model)), ("pickled", pickle.loads(pickle.dumps(model)))):
        found[name] = again(ids).logits.tolist()
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(config) is type(model.config) and config.to_dict() == model.config.to_dict()
    shutil.rmtree(first)  # from here on the first folder is gone
    second = load(scratch + "/second")
    settings = TrainingArguments(scratch + "/trainer", report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(second, settings).save_model(scratch + "/deep/er/third")
    third = load(scratch + "/deep/er/third")
    found["third"] = third(ids).logits.tolist()
    third.config.save_pretrained(scratch + "/config")
    alone = AutoConfig.from_pretrained(scratch + "/config", trust_remote_code=True)
    assert alone.distill == third.config.distill and type(alone).__name__ == type(third.config).__name__
    made = AutoModelForCausalLM.from_config(alone, trust_remote_code=True)
    made.load_state_dict(third.state_dict())
    found["made"] = made.eval()(ids).logits.tolist()
    third.save_pretrained(scratch + "/fourth")
print(json.dumps(found))
"""


@pytest.mark.parametrize("mixer", ["stock", "shared"])
def test_a_portable_folder_saved_again_loads_again(mixer, tiny_teacher, text_files, tmp_path):
    """By save_pretrained and by a Trainer, twice over, elsewhere, the first folder gone, in a process without its cache."""
    import students

    entries = tiny_entries(tiny_teacher, text_files)
    entries |= {"mixers": {"M": MIXERS[mixer]}, "stages": [{"initialise": {"tokens": 64}}]}
    folder = run(check(entries, "here"), runs=tmp_path)
    out = distill.export(folder.path, to="portable", out=tmp_path / "a folder" / "portable", dtype="float32")
    ids = torch.randint(1, 320, (2, 9))
    found = isolated(
        AGAIN,
        [str(out), str(tmp_path), json.dumps(ids.tolist())],
        tmp_path,
        TRAINED,
    )
    shutil.rmtree(tmp_path / "hf")
    found["fourth"] = elsewhere(tmp_path / "fourth", ids, tmp_path, WITHOUT, "--no-tokenizer")["logits"]
    with torch.no_grad():
        wanted = students.load(folder.student).eval()(ids).logits
        here = students.load(tmp_path / "fourth")
    assert set(found) == {"first", "copied", "pickled", "third", "made", "fourth"}
    for name, logits in found.items():
        assert (torch.tensor(logits) - wanted).abs().max() < 2e-5, name
    here.save_pretrained(tmp_path / "fifth")  # by this project, which puts no code beside it
    assert "auto_map" not in json.loads((tmp_path / "fifth" / "config.json").read_text())
    assert torch.equal(students.load(tmp_path / "fifth")(ids).logits, here(ids).logits)
