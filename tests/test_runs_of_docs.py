"""The scripts of docs/runs/: they parse, pages name them, and the commands that they give are taken by today's program.

Each shell script is run by bash with `distill`, `torchrun`, `srun` and `python` replaced by a program that writes down what
it is called with, so that quoting and arguments are those of a reader. Commands of `distill` are then parsed, and their
recipes checked with their overrides. Nothing trains.
"""

import ast
import importlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from distill.recipe_file import load
from tests.verbs import parsed

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in (ROOT / "docs/runs").iterdir() if path.suffix in (".sh", ".py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").glob("*.md")]
RECORD = '#!/bin/sh\nprintf "%s\\0" "$(basename "$0")" "$@" >> "$RECORDED"; printf "\\n\\0" >> "$RECORDED"\n'
ids = {"ids": lambda path: path.name}


def usage(path: Path) -> list[str]:
    """The words behind the script's name in its line of usage; what stands in brackets may be left out."""
    (line,) = re.findall(rf"^(?:# )?Usage: \w+ docs/runs/{path.name}\b(.*)$", path.read_text(), re.MULTILINE)
    return shlex.split(re.sub(r"\[.*", "", line))


def test_pages_and_scripts_name_each_other():
    named = {name for page in PAGES for name in re.findall(r"docs/runs/[\w./-]+\.(?:sh|py|yaml)\b", page.read_text())}
    assert not [name for name in named if not (ROOT / name).is_file()]
    assert named >= {str(path.relative_to(ROOT)) for path in SCRIPTS}


def test_scripts_of_folders_parse():
    for path in (ROOT / "docs/runs").glob("*/*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


def test_the_rehearsal_makes_chats_and_gives_a_command_that_is_taken(tmp_path):
    """docs/instruct.md: from the shipped text alone, on a CPU."""
    (tmp_path / "distill").write_text(RECORD)
    (tmp_path / "distill").chmod(stat.S_IRWXU)
    (tmp_path / "python").symlink_to(sys.executable)
    recorded, script = tmp_path / "recorded", ROOT / "docs/runs/instruct/rehearse.sh"
    around = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORDED": str(recorded)}
    subprocess.run(["bash", script, "my chats"], check=True, env=around, cwd=tmp_path)
    chats = [json.loads(line) for line in (tmp_path / "my chats" / "heldout.jsonl").read_text().splitlines()]
    assert len(chats) == 20 and all(len(chat["messages"]) == 2 for chat in chats)
    assert (tmp_path / "my chats" / "train.jsonl").is_file()
    (call,) = recorded.read_text().split("\n\0")[:-1]
    check_call(call.split("\0")[:-1])


@pytest.mark.parametrize("path", SCRIPTS, **ids)
def test_scripts_say_what_they_need(path):
    head = path.read_text()[:1500]
    assert re.search(r"^(# )?Needs: ", head, re.MULTILINE) and re.search(r"\b([Rr]an|run)\b.* (on|by)\b", head)
    assert usage(path) is not None and not re.search(r"(?<![\w.])/(work|home|tmp|mnt|root)/", path.read_text())
    assert all(len(line) <= 150 for line in path.read_text().splitlines())


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".py"], **ids)
def test_python_scripts_import_what_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), node.module


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".sh"], **ids)
def test_shell_scripts_give_commands_that_are_taken(path, tmp_path):
    subprocess.run(["bash", "-n", path], check=True)
    for name in ("distill", "torchrun", "srun", "python"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(stat.S_IRWXU)
    recorded = tmp_path / "recorded"
    around = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORDED": str(recorded)}
    words = ["quickstart" if word == "RECIPE" else word for word in usage(path)]
    subprocess.run(["bash", path, *words], check=True, env=around, cwd=ROOT)
    calls = [call.split("\0")[:-1] for call in recorded.read_text().split("\n\0")[:-1]]
    assert calls
    for call in calls:
        check_call(call)


def check_call(call: list[str]) -> None:
    """Refuse a command that the program of today would refuse before it reads a file."""
    if "-m" in call:
        module = call[call.index("-m") + 1]
        importlib.import_module(module)
        call = ["distill" if module == "distill.cli" else module, *call[call.index("-m") + 2 :]]
    if call[0] == "srun":
        call = call[1:]
    if call[0] != "distill":  # a module of tests/: recipe and overrides
        load(call[1], [word for word in call[2:] if not word.startswith("-")])
        return
    context = parsed(call[1:])
    recipe = context.params["recipe"] or "smollm2-135m_mamba2-hybrid"
    for name in [recipe] if isinstance(recipe, str) else recipe:
        overrides = list(context.params.get("overrides") or [])
        load(name, overrides)
        for variant in context.params.get("variants") or []:
            load(name, [*overrides, *(part.strip() for part in variant.split(":", 1)[1].split(";"))])
