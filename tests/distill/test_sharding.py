"""Whole-student stages divided over processes: one process's weights and losses, dtypes of computation, agreement of the
processes. Checkpoints in parts: read by rows, refused where they are damaged."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.errors import UserError
from distill.recipe import Recipe
from distill.runs import checkpoint, parts
from distill.runs.checkpoint import RunState
from distill.stages.imitate import Imitate
from distill.training.shares import bytes_of, share
from tests.distill import sharded_steps
from tests.distill.two_processes import TWO

GIB = 2**30


@pytest.fixture(scope="module")
def divided(tmp_path_factory, tiny_teacher, text_files):
    """The folder of what two processes came to, and the recipe's entries."""
    from tests.conftest import tiny_entries

    place, entries = tmp_path_factory.mktemp("divided"), tiny_entries(tiny_teacher, text_files)
    (place / "tiny.yaml").write_text(yaml.safe_dump(entries))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *TWO, "-m", "tests.distill.sharded_steps", str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return place, entries


def numbers(place: Path, rank: int = 0) -> dict:
    return json.loads((place / f"numbers-{rank}.json").read_text())


@pytest.mark.parametrize("case", sharded_steps.CASES)
def test_two_processes_take_one_processs_steps(divided, case):
    place, entries = divided
    weights, found = sharded_steps.stepped(entries, case, divide=False)
    saved = load_file(place / "divided.safetensors")
    theirs = {name.partition("|")[2]: tensor for name, tensor in saved.items() if name.startswith(f"{case}|")}
    assert theirs.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (theirs[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max().clamp_min(1.0), name
    for rank in (0, 1):
        assert numbers(place, rank)[case] == pytest.approx(found, rel=1e-5)


def test_decays_vectors_and_norms_compute_in_float32(divided):
    types = numbers(divided[0])["types"]
    mixer, layer = "model.layers.1.self_attn.mixer", "model.layers.0"
    wide = [f"{mixer}.ssm.a_proj.weight", f"{mixer}.ssm.a_proj.bias", f"{mixer}.ssm.D", f"{mixer}.ssm.gain"]
    wide += [f"{mixer}.window.scale", f"{layer}.input_layernorm.weight", "model.norm.weight"]
    narrow = [f"{mixer}.ssm.in_proj.weight", f"{mixer}.ssm.z_proj.weight", f"{mixer}.window.q_proj.weight"]
    narrow += [f"{layer}.mlp.up_proj.weight", f"{layer}.self_attn.q_proj.weight", "model.embed_tokens.weight"]
    assert {types[name] for name in wide} == {"torch.float32"}
    assert {types[name] for name in narrow} == {"torch.bfloat16"}


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_agree(divided, rank):
    said = numbers(divided[0], rank)["said"]
    assert "process 1 was started with another recipe than process 0 (fingerprints 0000000a and 81affc48" in said["recipes"]
    assert said["same recipes"] == "nothing"
    assert said["shares"] == "the second one cannot"
    assert (
        "1-imitate-0000004 could not be written" in said["full disk"] and "earlier ones are untouched" in said["full disk"]
    )
    assert said["checkpoints"] == "1-imitate-0000003"
    assert said["nan"] == "c"
    assert said["averages"] == "[[1.5, 1.5, 1.5], [2.0, 2.0], None]"


# parts


@pytest.fixture
def in_parts(divided, tmp_path):
    """A copy of the checkpoint that two processes wrote."""
    target = tmp_path / "checkpoints" / "1-imitate-0000003"
    target.parent.mkdir()
    source = divided[0] / "checkpoints" / target.name
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_rows_are_read_by_any_number(in_parts):
    state, complaints = checkpoint.newest_sound(in_parts.parent)
    assert state.processes == 2 and not complaints
    stored = checkpoint.tensors_of(in_parts, "student")
    assert set(stored) == {"whole", "rows"} and stored.shape("rows") == (3, 2)
    assert stored["rows"].tolist() == [[0, 0], [1, 1], [1, 1]] and stored["whole"].tolist() == [0, 1, 2]
    for start, stop in ((0, 3), (0, 1), (1, 2), (0, 2), (3, 3)):
        assert stored.rows("rows", start, stop).tolist() == stored["rows"][start:stop].tolist()
        assert stored.rows("whole", start, stop).tolist() == stored["whole"][start:stop].tolist()
    own = [checkpoint.random_of(in_parts, rank, 2)["torch"] for rank in (0, 1)]
    assert checkpoint.random_of(in_parts, 0, 3)["torch"].equal(own[0])


@pytest.mark.parametrize(
    "name", ["student-00002-of-00002.safetensors", "parts-00001-of-00002.json", "rng-00002-of-00002.safetensors"]
)
@pytest.mark.parametrize("how", ["missing", "another run's"])
def test_parts_that_are_not_whole_are_set_aside(in_parts, name, how):
    (in_parts / name).unlink() if how == "missing" else (in_parts / name).write_bytes(b"of another run")
    state, (complaint,) = checkpoint.newest_sound(in_parts.parent)
    assert state is None and name in complaint and "is damaged" in complaint and "set aside as .damaged-" in complaint


def test_parts_that_lie_are_refused(in_parts):
    """Hashes that fit do not help where rows are left out or stand twice."""
    listed = in_parts / "parts-00002-of-00002.json"
    content = json.loads(listed.read_text())
    for start in (0, 2):
        content["tensors"]["student"]["rows"]["start"] = start
        listed.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"1-imitate-0000003 is damaged"), checkpoint.whole(in_parts):
            checkpoint.tensors_of(in_parts, "student")
    content["tensors"]["student"]["rows"]["start"] = -1
    listed.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"parts-00002-of-00002.json is damaged"):
        checkpoint.tensors_of(in_parts, "student")


def test_no_pickle_is_loaded(in_parts, tmp_path):
    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    for name in ("__0_0.distcp", ".metadata", "student-00001-of-00002.pt", "optimizer.bin", "rng.pkl"):
        (in_parts / name).write_bytes(pickle.dumps(Planted()))
    state, _ = checkpoint.newest_sound(in_parts.parent)
    assert state is not None
    for group in ("student", "optimizer", "stage", "rng"):
        dict(checkpoint.tensors_of(in_parts, group))
    (in_parts / "student-00001-of-00002.safetensors").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UserError, match="is damaged"), checkpoint.whole(in_parts):
        checkpoint.tensors_of(in_parts, "student")
    assert not (tmp_path / "it ran").exists()


def test_a_state_names_its_files(tmp_path):
    """A state that names other files than a checkpoint has is none."""
    checkpoint.save(tmp_path, RunState(0, "align", 1, False, 0, "t"), {"rng": {"torch": torch.zeros(1)}}, 2)
    file = tmp_path / "0-align-0000001" / "state.json"
    for name, sound in ((parts.numbered("optimizer.safetensors", 3, 12), True), ("optimizer-1-of-2.safetensors", False)):
        content = json.loads(file.read_text())
        content["files"] = {name: "0" * 64}
        file.write_text(json.dumps(content))
        if sound:
            assert checkpoint.read_state(file.parent, files=False).files == content["files"]
        else:
            with pytest.raises(UserError, match=r"state\.json is damaged"):
                checkpoint.read_state(file.parent, files=False)


# what is divided


@pytest.mark.parametrize(
    ("asked", "world", "trained", "teacher", "kind", "held"),
    [
        ("auto", 1, 8e9, 15 * GIB, "none", 15 * GIB + 16 * 8e9),
        ("student", 1, 8e9, 15 * GIB, "none", 15 * GIB + 16 * 8e9),
        ("auto", 4, 1e9, 2 * GIB, "none", 2 * GIB + 16e9),
        ("auto", 4, 8e9, 15 * GIB, "student", 15 * GIB + 4 * 8e9),
        ("auto", 2, 8e9, 15 * GIB, "all", (15 * GIB + 16 * 8e9) / 2),
        ("auto", 8, 8e9, 132 * GIB, "all", (132 * GIB + 16 * 8e9) / 8),
        ("none", 4, 8e9, 15 * GIB, "none", 15 * GIB + 16 * 8e9),
        ("all", 2, 1.0, 1.0, "all", 8.5),
    ],
)
def test_what_auto_divides(asked, world, trained, teacher, kind, held):
    masters = bytes_of(trained, Imitate.Options(tokens=1, lr=1.0))
    found = share(asked, world, masters, teacher, 79 * GIB)
    assert (found.kind, found.held) == (kind, pytest.approx(held))


def test_shard_is_no_part_of_a_recipes_fingerprint(tiny_recipe):
    prints = {
        Recipe(**tiny_recipe, **({"shard": kind} if kind else {})).fingerprint for kind in (None, "auto", "all", "none")
    }
    assert len(prints) == 1
