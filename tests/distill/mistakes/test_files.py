"""Files of run folders that are missing, empty, cut short, of another type or absurdly large, links, and names that bite."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distill.runs import checkpoint
from tests.distill.mistakes.damaged_runs import run_folder


def written(content):
    def damage(file):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def changed(at, value):
    """The entry at a path of keys is another."""

    def damage(file):
        content = json.loads(file.read_text())
        *parents, last = at
        place = content
        for key in parents:
            place = place[key]
        place[last] = value
        file.write_text(json.dumps(content))

    return damage


def without(*at):
    def damage(file):
        content = place = json.loads(file.read_text())
        for key in at[:-1]:
            place = place[key]
        del place[at[-1]]
        file.write_text(json.dumps(content))

    return damage


def grown(mebibytes):
    return lambda file: os.truncate(file, mebibytes * 2**20)  # takes no room on the disk


def piped(file):
    file.unlink()
    os.mkfifo(file)


def arrays(**found):
    def damage(file):
        np.savez(file, **found)

    return damage


STUDENT = ("final", "rows", "student")
AGAIN = "the same `distill run` evaluates again"
HEAD = "layer 1 head 0"
# of a finished run: the file, what is done to it, the command (None: report) and what is said
FINISHED = [
    ("run.json", written(""), "run", ["run.json is damaged (it is empty); delete it to have it made again"]),
    ("run.json", written("[]"), "run", ["run.json is damaged (it is []: it should be a valid mapping"]),
    ("run.json", written('{"teacher": "a", "teacher": "b"}'), "run", ["the key 'teacher' is given twice"]),
    ("run.json", changed(["format"], "1"), "run", ["run.json is damaged (format is '1': it should be a valid integer)"]),
    ("run.json", changed(["versions"], ["torch"]), None, ["run.json is damaged (versions is ['torch']", "valid mapping"]),
    ("run.json", changed(["finished"], "yes"), "run", ["finished is 'yes': it should be a valid boolean"]),
    ("run.json", written("[" * 100_000), "run", ["run.json is damaged (it is nested deeper than 64)"]),
    ("run.json", grown(65), "run", ["run.json is 65 MiB, and at most 64 MiB are read; delete it to have it made again"]),
    ("run.json", piped, "run", ["run.json is not a plain file; delete it to have it made again"]),
    ("recipe.yaml", grown(1), "run", ["recipe.yaml is 1 MiB, and at most 256 KiB are read"]),
    ("recipe.yaml", written("name: &a [*a]"), None, ["recipe.yaml is not valid YAML: the alias *a is used inside the node"]),
    ("resolved.yaml", written("name: 010"), None, ["resolved.yaml is not valid YAML: 010 is read in base 8 by YAML 1.1"]),
    ("evaluations.json", written("{"), None, ["evaluations.json is damaged (it ends early, line 1 column 2)", AGAIN]),
    (
        "evaluations.json",
        changed(["after"], []),
        None,
        ["evaluations.json is damaged (after is []: it should be a valid mapping"],
    ),
    (
        "evaluations.json",
        changed(["after", "x"], {}),
        None,
        ["evaluations.json is damaged (after.x is not the name of a stage)"],
    ),
    ("evaluations.json", changed(["after", "1-align"], {}), None, ["after.1-align.probe is missing", AGAIN]),
    (
        "evaluations.json",
        changed([*STUDENT, "fidelity", "kl"], "0.5"),
        None,
        ["rows.student.fidelity.kl is '0.5': it should"],
    ),
    (
        "evaluations.json",
        changed([*STUDENT, "fidelity", "documents", "kl"], [1.0]),
        None,
        ["its lists should be of one length"],
    ),
    (
        "evaluations.json",
        changed([*STUDENT, "passkey", 0, "trials"], 0),
        None,
        ["passkey.0.trials is 0: it should be greater"],
    ),
    (
        "evaluations.json",
        changed([*STUDENT, "passkey"], [{"length": 64, "recalled": 1, "trials": 2}] * 9),
        None,
        ["as many"],
    ),
    ("evaluations.json", changed(["final", "rows", "x"], {}), None, ["final.rows.x", "it should be 'teacher', 'student'"]),
    ("evaluations.json", changed(["final", "pattern"], ""), None, ["final.pattern is '': String should match"]),
    ("evaluations.json", without("final", "rows", "teacher"), None, ["its rows should have the teacher"]),
    ("evaluations.json", without(*STUDENT, "fidelity"), None, ["rows.student.fidelity is missing"]),
    ("evaluations.json", changed(["final", "not_run", 0, "rows"], "x"), None, ["not_run.0.rows is 'x'", "valid list"]),
    ("metrics.jsonl", written('{"loss": 1}\n{}\n'), None, ["metrics.jsonl is damaged (line 1: ", "delete the line"]),
    ("metrics.jsonl", written(b"\xff\n\n"), None, ["metrics.jsonl is damaged (line 1: byte 0 is not UTF-8)"]),
    ("samples.json", written('{"prompt": 5}'), None, ["samples.json is damaged (prompt is 5", "makes it again"]),
    ("samples.json", written('{"prompt": "a", "teacher": "b"}'), None, ["samples.json is damaged (student is missing)"]),
    ("selection.json", written('{"chosen": {"by": "kl"}}'), None, ["selection.json is damaged (chosen.options is missing)"]),
    ("selection.json", written('{"measured": [1]}'), None, ["selection.json is damaged (measured is [1]", "measured again"]),
    ("matrices.npz", written(b""), None, ["matrices.npz is damaged (it is empty); delete it, and the same `distill run`"]),
    ("matrices.npz", written(b"PK\5\6"), None, ["matrices.npz is damaged (File is not a zip file)"]),
    ("matrices.npz", arrays(a=np.array([{}], object)), None, ["matrices.npz is damaged (a.npy holds object, not numbers)"]),
    (
        "matrices.npz",
        arrays(**{f"{HEAD} mixer": np.eye(4)}),
        None,
        [f"'{HEAD} mixer' has no attention matrix with it"],
    ),
    (
        "matrices.npz",
        arrays(**{f"{HEAD} attention": np.eye(4), f"{HEAD} mixer": np.eye(5)}),
        None,
        ["have different shapes"],
    ),
    ("matrices.npz", arrays(a=np.zeros((2, 2000), "f4")), None, ["'a' is float32 of shape (2, 2000), not a square matrix"]),
]


@pytest.mark.parametrize(
    ("name", "damage", "command", "parts"), FINISHED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_files_of_a_finished_run(copied_place, refuse, name, damage, command, parts):
    folder = run_folder(copied_place, "short")
    damage(folder / name)
    refuse(copied_place, ["run", "short.yaml"] if command else ["report", folder.relative_to(copied_place)], parts)


# of a stopped run: what is done to its newest checkpoint, and what going on says (its hashes are right: it lies)


def lying(name, tensors):
    def damage(newest):
        save_file(tensors, newest / f"{name}.safetensors")
        content = json.loads((newest / "state.json").read_text())
        content["files"][f"{name}.safetensors"] = checkpoint.file_hash(newest / f"{name}.safetensors")
        state = checkpoint.RunState(**content)
        (newest / "state.json").write_text(json.dumps(content | {"digest": state.hashed()}))

    return damage


FALL_BACK = "delete it to go on from the one before, or start again with --fresh"
STOPPED = {
    "random states that are none": lying("rng", {"torch": torch.zeros(3)}),
    "another's tensors": lying("student", {"model.norm.weight": torch.zeros(7)}),
    "another's optimizer": lying("optimizer", {"no such parameter|step": torch.zeros(1)}),
}


@pytest.mark.parametrize("name", STOPPED)
def test_checkpoints_that_lie(copied_place, refuse, name):
    newest = checkpoint.latest(run_folder(copied_place, "half") / "checkpoints")
    STOPPED[name](newest)
    refuse(copied_place, ["run", "half.yaml"], DAMAGE_SAID[name])


DAMAGE_SAID = {
    "random states that are none": ["is damaged (its tensors are not those of this student's run)", FALL_BACK],
    "another's tensors": ["the checkpoint's model.norm.weight does not fit this student"],
    "another's optimizer": ["is damaged (its tensors are not those of this student's run)", FALL_BACK],
}


@pytest.mark.parametrize("name", ["1-align-copy", "1-align-0000003-copy", "a-b-c", "1-align-0000099"])
def test_a_folder_among_checkpoints_that_is_none(copied_place, name):
    """A copy that somebody made, or a file: it is no checkpoint, and no reason to fail."""
    folder = run_folder(copied_place, "half") / "checkpoints"
    newest = checkpoint.latest(folder)
    if name.endswith("99"):
        (folder / name).touch()
    else:
        shutil.copytree(newest, folder / name)
    assert checkpoint.latest(folder) == newest
