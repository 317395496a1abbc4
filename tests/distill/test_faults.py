"""Faults: kill -9 at any moment with an exact resume, values that are not finite, and what a resume counts and reads."""

import json
import multiprocessing
import os
import random
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distill
from distill import run
from distill.errors import Interrupted, UserError
from distill.evaluation import samples
from distill.recipe_file import check
from distill.runs import checkpoint, parts
from distill.runs.stopper import Stopper
from distill.stages.imitate import Imitate
from distill.training import runner
from distill.training.trainer import NonFinite
from tests.conftest import SEED, tiny_entries

MOMENTS = 20
PRELOADED = [
    "datasets",
    "distill.exporters.portable",
    "distill.selection.resolution",
    "peft",
    "distill.training.runner",
    "distill.reports",
    "distill.evaluation.target",
    "transformers.models.llama.modeling_llama",
]


def take(entries: dict, runs: str, slow: float) -> None:
    """What a killed process does: the whole recipe. slow: seconds that each file's way to the disk is made to take."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    torch.set_num_threads(1)  # the sums of two threads wait for each other where the suite already takes every core
    samples.NEW_TOKENS = 2
    if slow:
        sync = parts.sync
        parts.sync = lambda path: (time.sleep(slow), sync(path))
    run(check(entries, "tiny.yaml"), runs=runs)


def start(entries: dict, runs: Path, slow: float = 0.0):
    """A process of its own at work on a recipe, from the moment that its run folder exists."""
    context = multiprocessing.get_context("forkserver")  # forks what has imported everything and computed nothing
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=take, args=(entries, str(runs), slow))
    process.start()
    while not list(runs.glob("tiny-*")):
        assert process.is_alive(), "the run never began"
        time.sleep(0.002)
    return process


def finish(process) -> None:
    process.join()
    assert process.exitcode == 0


def outcome(runs: Path) -> tuple[dict, list]:
    """The finished weights, and every logged step's loss."""
    (folder,) = runs.glob("tiny-*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "student" / "model.safetensors"), [
        (line["stage"], line["step"], line["loss"]) for line in lines
    ]


def assert_same(one, other) -> None:
    (weights, losses), (other_weights, other_losses) = one, other
    assert losses == other_losses
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


@pytest.fixture(scope="module")
def entries(tiny_teacher, text_files):
    """A short recipe: ten steps in three stages, each followed by a checkpoint."""
    entries = tiny_entries(tiny_teacher, text_files) | {"checkpoints": {"steps": 1}}
    entries["evaluation"] = {"tokens": 64, "probe_tokens": 32, "passkey": [64], "passkey_trials": 1}
    for stage, tokens in zip(entries["stages"], (128, 256, 512, 512), strict=True):
        next(iter(stage.values()))["tokens"] = tokens
    return entries


@pytest.fixture(scope="module")
def uninterrupted(entries, tmp_path_factory):
    """What a run that nobody disturbs ends with, and the seconds that it takes from its folder on."""
    runs = tmp_path_factory.mktemp("whole")
    process = start(entries, runs)
    began = time.monotonic()
    finish(process)
    return outcome(runs), time.monotonic() - began


@pytest.mark.faults
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_kill_9_at_a_random_moment_and_go_on(entries, uninterrupted, tmp_path, moment):
    whole, seconds = uninterrupted
    wait = seconds * random.Random(f"{SEED} {moment}").random()
    for attempt in range(20):
        runs = tmp_path / str(attempt)
        process = start(entries, runs)
        time.sleep(wait)
        process.kill()
        process.join()
        if process.exitcode == -9:
            break
        wait *= 0.8  # this time the machine was faster, and the run was over
    assert process.exitcode == -9
    finish(start(entries, runs))
    assert_same(outcome(runs), whole)


def test_kill_9_while_a_checkpoint_is_written_and_go_on(entries, uninterrupted, tmp_path):
    process = start(entries, tmp_path, slow=0.1)
    while not list(tmp_path.glob(f"*/checkpoints/{checkpoint.SCRATCH}2-*")):
        assert process.is_alive(), "the moment never came"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert list(tmp_path.glob(f"*/checkpoints/{checkpoint.SCRATCH}*")), "no half-written checkpoint was left behind"
    finish(start(entries, tmp_path))
    assert_same(outcome(tmp_path), uninterrupted[0])


# numbers that are no numbers


def poisoned_at(call: int, poison):
    """`Imitate.losses`, with something done to the stage before its so-manieth call in training."""
    losses, calls = Imitate.losses, iter(range(1, 1000))

    def poisoned(self, batch):
        if self.options.tokens > 1 and next(calls) == call:  # the probe's stages have one token
            poison(self)
        return losses(self, batch)

    return poisoned


def spoil(parameter) -> None:
    parameter.data = torch.full_like(parameter.data, torch.nan)


@pytest.mark.parametrize(
    ("poison", "said", "fix"),
    [
        (
            lambda stage: spoil(next(stage.student.mixers[1].parameters())),
            r"the student's first output that is not finite is that of layer 1 \(model\.layers\.1\.self_attn\.mixer",
            "try a lower lr",
        ),
        (
            lambda stage: spoil(stage.teacher.model.model.layers[2].mlp.up_proj.weight),
            r"the teacher's first output that is not finite is that of layer 2 \(model\.layers\.2\.mlp\.up_proj\)",
            "choose another teacher, or precision=float32",
        ),
    ],
    ids=["student", "teacher"],
)
def test_a_loss_that_is_no_number_names_layer_and_step_to_whoever_asks(
    tiny_recipe, tmp_path, monkeypatch, poison, said, fix
):
    tiny_recipe |= {"checkpoints": {"steps": 1}, "stages": [tiny_recipe["stages"][0], tiny_recipe["stages"][3]]}
    monkeypatch.setattr(Imitate, "losses", poisoned_at(3, poison))
    with pytest.raises(NonFinite) as stopped:
        run(check(tiny_recipe, "tiny.yaml"), runs=tmp_path)
    assert stopped.match(f"stage imitate: the loss at step 3 is nan; {said}")
    assert stopped.match(rf"{fix}\. The same recipe would fail again; a changed recipe is a new run$")
    (folder,) = tmp_path.glob("tiny-*")
    assert checkpoint.latest(folder / "checkpoints").name.startswith("1-imitate-0000002")  # what was trained is still there
    for ask in (distill.evaluate, lambda path: distill.export(path, out=tmp_path / "out")):
        with pytest.raises(
            UserError, match=f"has no finished student yet; stage imitate: the loss at step 3 is nan; {said}"
        ):
            ask(folder)
    page = distill.report(folder).read_text()
    assert "the loss at step 3 is nan" in page and "goes on with it" not in page


# what a resume counts and reads


def test_a_resumed_stage_counts_its_seconds_and_reads_each_file_once(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe["stages"] = [tiny_recipe["stages"][0], tiny_recipe["stages"][2]]
    recipe, steps = check(tiny_recipe, "tiny.yaml"), iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(steps) == 2 else None)
        run(recipe, runs=tmp_path)
    (state,) = tmp_path.glob("tiny-*/checkpoints/1-align-*/state.json")
    content = json.loads(state.read_text())
    assert 0 < content["seconds"] < 600
    longer = checkpoint.RunState(**content | {"seconds": 10_000.0})
    state.write_text(json.dumps(asdict(longer) | {"digest": longer.hashed()}))
    read, digest = [], checkpoint.file_hash
    monkeypatch.setattr(checkpoint, "file_hash", lambda file: (read.append(file), digest(file))[1])
    monkeypatch.setattr(runner.Run, "conclude", lambda self: None)
    folder = run(recipe, runs=tmp_path)
    resumed_from = [file.name for file in read if file.parent.name == state.parent.name]
    assert sorted(resumed_from) == sorted(content["files"])
    assert folder.read("evaluations.json")["after"]["1-align"]["seconds"] > 10_000
