"""A place with everything that a mistake could spoil, and the question whether it did."""

import hashlib
import re
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
import yaml

import distill
from distill import cli
from distill.errors import Interrupted
from distill.recipe_file import check
from distill.runs.stopper import Stopper
from tests.conftest import tiny_entries
from tests.small_disks import small_disk_at


def hashes(folder):
    """Every file below a folder, and the hash of what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def one_thread():
    """These models are tiny, and threads would wait for each other where the suite already takes every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def each_in_one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="session")
def made_place(tmp_path_factory, tiny_teacher, text_files):
    """A recipe, its finished run, an export, and a second recipe whose run stopped in the middle of align."""
    folder = tmp_path_factory.mktemp("a place")
    entries = tiny_entries(tiny_teacher, text_files)
    stages = entries["stages"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(entries))
    short = entries | {"name": "short", "stages": [stages[0], {"align": {"tokens": 256, "lr": 1e-3}}]}
    (folder / "short.yaml").write_text(yaml.safe_dump(short))
    with one_thread():
        finished = distill.run(folder / "short.yaml", runs=folder / "runs")
    distill.export(finished.path, out=folder / "out", verify=False)
    half = entries | {"name": "half", "stages": [stages[0], {"align": {"tokens": 768, "lr": 1e-3}}]}
    (folder / "half.yaml").write_text(yaml.safe_dump(half))
    with one_thread():
        _stop_after(3, folder / "half.yaml", folder / "runs")
    finished.path.rename(folder / "runs" / "finished")
    (folder / "runs" / f"half-{check(half, 'half.yaml').fingerprint}").rename(folder / "runs" / "stopped")
    return folder


def _stop_after(steps, recipe, runs):
    asked = iter(range(1000))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == steps else None)
        distill.run(recipe, runs=runs)


@pytest.fixture
def place(made_place, monkeypatch):
    """The place itself, for mistakes that must not touch it."""
    monkeypatch.chdir(made_place)
    return made_place


@pytest.fixture
def copied_place(made_place, tmp_path, monkeypatch):
    """A copy of the place, to damage. Its runs have the names that their recipes ask for."""
    folder = shutil.copytree(made_place, tmp_path / "a place")
    for name, recipe in (("finished", "short"), ("stopped", "half")):
        fingerprint = check(yaml.safe_load((folder / f"{recipe}.yaml").read_text()), recipe).fingerprint
        (folder / "runs" / name).rename(folder / "runs" / f"{recipe}-{fingerprint}")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Call the command line in this process; it must end in exit code 2 and one message, and touch nothing.

    `refuse(folder, arguments, parts)`: the message must hold every part. Gives the message.
    """

    def called(folder, arguments, parts):
        before = hashes(folder)
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.entry()
        printed = capsys.readouterr().err
        said = " ".join(printed.split())
        assert ended.value.code == 2, said
        assert "Traceback" not in said and len(re.findall("^error: |─ Error ─", printed, re.MULTILINE)) == 1, said
        for part in parts:
            assert part in said, f"{part!r} is not in: {said}"
        after = hashes(folder)
        assert {name: after.get(name) for name in before} == before, "something already written was touched"
        return said

    return called


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_at(tmp_path / "disk", "400k") as folder:
        yield folder
