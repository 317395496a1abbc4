"""docs/extending.md, followed word by word in a copy of the sources: what it adds passes the contract and is used."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from tests.conftest import tiny_entries

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()
NEW_FILE = re.compile(r"<!-- new file: (\S+) -->\n```python\n(.*?)```\n", re.DOTALL)
LINE = re.compile(r"<!-- line in (\S+), in (\w+) -->\n```python\n(.*?)```\n", re.DOTALL)
RECIPE = re.compile(r"<!-- recipe -->\n```yaml\n(.*?)```\n", re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the sources with everything that the page adds."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("distill", "students", "teachers", "recipes", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copy(ROOT / "CONTRIBUTING.md", copy)
    for file, content in NEW_FILE.findall(TEXT):
        assert not (copy / file).exists(), file
        (copy / file).write_text(content)
    for file, table, line in LINE.findall(TEXT):
        source = (copy / file).read_text()
        opened = source.index(f"\n{table} = {{\n")
        closed = source.index("\n}", opened) + 1
        (copy / file).write_text(source[:closed] + line + source[closed:])
    return copy


def call(extended, *arguments, expect=0):
    """What a command printed in the copy, its messages included."""
    environment = os.environ | {"PYTHONPATH": str(extended), "COLUMNS": "200"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=extended, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == expect, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def test_each_addition_is_a_file_and_a_line():
    files, tables = [file for file, _ in NEW_FILE.findall(TEXT)], [table for _, table, _ in LINE.findall(TEXT)]
    assert len(files) == len(tables) == 3 and tables == ["MIXERS", "STAGES", "EXPORTERS"]


def test_the_mixer_passes_the_contract(extended):
    said = call(
        extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/students/test_mixers.py", "-k", "decayed_mean"
    )
    assert int(re.search(r"(\d+) passed", said)[1]) > 20


def test_nothing_else_has_to_change(extended):
    """Sizes, floors, circles, tables and the way the command line lists things hold with the new files in place."""
    kept = ["tests/test_style.py", "tests/test_imports.py"]
    call(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", *kept)
    assert "mixers-alone" in call(extended, "-m", "distill.cli", "export", "--help")


def test_a_recipe_uses_all_three(extended, tiny_teacher, text_files, tmp_path):
    entries = tiny_entries(tiny_teacher, text_files) | yaml.safe_load(RECIPE.search(TEXT)[1].replace("1e-3", "0.001"))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(entries | {"name": "mine"}))
    plan = call(extended, "-m", "distill.cli", "plan", path)
    assert "turn" in plan and "mixers-alone" in plan
    call(extended, "-m", "distill.cli", "run", path, "--runs", tmp_path)
    (folder,) = tmp_path.glob("mine-*")
    with safe_open(folder / "export" / "mixers-alone" / "mixers.safetensors", "pt") as file:
        names = file.keys()
    assert {name.rpartition(".mixer.")[2] for name in names} == {"v_proj.weight", "decay", "out_proj.weight"}
    after = json.loads((folder / "evaluations.json").read_text())["after"]
    assert after["1-turn"]["probe"]["turn"] < after["0-initialise"]["probe"]["turn"]
    assert "direction against attention" in (folder / "report.html").read_text()
    call(extended, "-m", "distill.cli", "export", folder, "--to", "mixers-alone", "--out", tmp_path / "again")
    with_meta = {"meta_tokens": 2, "stages": [*entries["stages"], {"imitate": {"tokens": 256, "lr": 0.001}}]}
    path.write_text(yaml.safe_dump(entries | with_meta))
    refused = call(extended, "-m", "distill.cli", "plan", path, expect=2)
    assert "export: mixers-alone cannot hold this student: meta tokens belong to no mixer" in refused
