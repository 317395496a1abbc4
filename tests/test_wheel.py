"""The wheel: it holds only what an installation needs, and works without the source tree."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_entries

ROOT = Path(__file__).parent.parent
PACKAGES = ("distill", "students", "teachers")
SHIPPED = r"recipes/(README\.md|[\w.-]+\.yaml|recipe\.schema\.json|configs/[\w.-]+\.json|text/(LICENSE\.md|\w+\.jsonl\.xz))"
CODE = rf"({'|'.join(PACKAGES)})/([\w/]+\.py|py\.typed)"
META = r"distill_hybrids-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}

# Every name of the API, on the shipped recipe; prints where the packages were found.
API = """
import distill, students, teachers
from distill.planning import make_plan
from distill.recipe_file import load
assert callable(distill.run) and callable(distill.evaluate) and callable(distill.export)
assert callable(students.load) and callable(teachers.load)
assert make_plan(load("quickstart")).layout.converted
from typer.testing import CliRunner
from distill.cli import app
for verb in (["recipes", "ls"], ["doctor"], ["plan", "smollm2-135m_mamba2-hybrid"]):
    done = CliRunner().invoke(app, verb)
    assert done.exit_code == 0, done.output
print(distill.__file__, students.__file__, teachers.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in this environment."""
    return build(tmp_path_factory.mktemp("wheel"), "--no-isolation")


def build(folder, *options):
    command = [sys.executable, "-m", "build", "--wheel", *options, "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_what_it_should_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    strange = sorted(name for name in names if not re.fullmatch(f"{SHIPPED}|{CODE}|{META}", name))
    assert not strange
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert sources and not sources - names
    meta = {name.rpartition("/")[2]: zipfile.ZipFile(wheel).read(name).decode() for name in names if ".dist-info/" in name}
    assert meta["LICENSE"] == (ROOT / "LICENSE").read_text()
    assert "distill = distill.cli:entry" in meta["entry_points.txt"]
    assert all(f"Provides-Extra: {extra}" in meta["METADATA"] for extra in ("gguf", "eval", "fla", "trackers"))


def test_unpacked_it_works_without_the_sources(wheel, tmp_path):
    """What `make test-wheel` does in an empty environment, here with this environment's other packages."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(tmp_path / "unpacked")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", API], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.startswith(str(tmp_path / "unpacked")) for path in done.stdout.split())


def test_extras_that_messages_name_exist():
    """`pip install 'distill-hybrids[X]'`, wherever it is said, names this distribution and an extra of it."""
    text = (ROOT / "pyproject.toml").read_text()
    name = re.search(r'^name = "(.*)"', text, re.MULTILINE)[1]
    extras = set(re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M))
    said = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        others = r"--no-deps|\{|llama-cpp-python"  # packages of others
        for hint in re.findall(rf"pip install (?!{others})(\S+)", path.read_text()):
            found = re.match(rf"'{name}\[(\w+)\]'", hint)
            assert found and found[1] in extras, f"{path}: pip install {hint}"
            said.add(found[1])
    assert said == {"gguf", "eval", "fla", "int8", "trackers"}


# in an empty environment

# The API from a recipe to an export, with teacher, text and folders from the command line.
WHOLE = """
import sys, distill, students, teachers
folder = distill.run(sys.argv[1], runs=sys.argv[2])
judged = distill.evaluate(folder.path)
assert judged["rows"]["student"]["fidelity"]["kl"] > 0
written = distill.export(folder.path, to="portable", out=sys.argv[3])
student, teacher = students.load(folder.student), teachers.load(folder.recipe().teacher)
assert student.config.vocab_size == teacher.config.vocab_size and (written / "config.json").exists()
print("found at", distill.__file__, students.__file__, teachers.__file__)
"""


@pytest.mark.wheel
def test_in_an_empty_environment(tmp_path, tiny_teacher, text_files):
    """pip install of the built wheel, with the constraints file, and nothing of this project's sources in reach."""
    venv, place = tmp_path / "venv", tmp_path / "a place"
    place.mkdir()
    path = build(tmp_path / "wheel")
    python, torch = (
        venv / "bin" / "python",
        re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0],
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | OFFLINE
    environment |= {"DISTILL_CACHE": str(tmp_path / "cache")}

    def call(*command, expect=0):
        command = [str(part) for part in command]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expect, f"{command}: {done.stdout[-2000:]} {done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    call(sys.executable, "-m", "venv", venv)
    constraints = ("-c", ROOT / "constraints.txt")
    call(python, "-m", "pip", "install", "-q", torch, *constraints)
    call(python, "-m", "pip", "install", "-q", path, *constraints)
    call(python, "-m", "pip", "check")

    distill = venv / "bin" / "distill"
    shipped = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
    listed = call(distill, "recipes", "ls")
    assert all(name in listed for name in shipped)
    assert "missing gguf" in call(distill, "doctor")
    said = call(distill, "plan", "llama-3.2-1b_mamba2-hybrid", expect=2)
    assert "export: gguf" in said and "pip install 'distill-hybrids[gguf]'" in said
    for name in shipped:
        assert "trained parameters" in call(distill, "plan", name, "export=[portable]")
    (place / "nothing.gguf").write_bytes(b"GGUF")
    said = call(distill, "run", "quickstart", "teacher=nothing.gguf", expect=2)
    assert "pip install 'distill-hybrids[gguf]'" in said

    entries = tiny_entries(tiny_teacher, text_files) | {"export": ["portable"]}
    (place / "tiny.yaml").write_text(yaml.safe_dump(entries))
    assert "held-out KL" in call(distill, "run", "tiny.yaml")
    (run_folder,) = (place / "runs").glob("tiny-*")
    call(distill, "eval", run_folder, "--json", "numbers.json")
    assert json.loads((place / "numbers.json").read_text())["rows"]["student"]
    assert "The river" in call(distill, "generate", run_folder, "The river", "--tokens", 4)
    said = call(python, "-c", WHOLE, "tiny.yaml", "other runs", "exported")
    (found,) = (line for line in said.splitlines() if line.startswith("found at "))
    assert found.count(str(venv)) == len(PACKAGES)
