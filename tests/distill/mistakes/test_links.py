"""Links where files are written, files that are not ours, and names that a terminal or a file system would act on."""

import io
import json
import os
import re
import shutil
import sys

import pytest
import yaml
from rich.table import Table

import distill
from distill import cli
from distill.console import PlainConsole, bold
from distill.errors import HIDDEN, UserError
from distill.recipe_file import check
from distill.runs.run_dir import RunDir, alone
from tests.distill.mistakes.damaged_runs import run_folder

# links: nothing is written through one, and nothing is read that was not named


@pytest.mark.parametrize("name", ["student", "report.html", "metrics.jsonl", "matrices.npz", "run.json", "twin", "export"])
@pytest.mark.parametrize("leads", ["secret", "gone"])
def test_a_link_in_a_run_folder(copied_place, refuse, name, leads):
    folder = run_folder(copied_place, "short")
    (copied_place / "secret").write_text("kept")
    if (folder / name).is_dir():
        (folder / name).rename(copied_place / "moved")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(copied_place / leads)
    said = refuse(copied_place, ["run", "short.yaml"], [f"{name} is a link to {copied_place / leads}", "remove it"])
    assert "nothing is written through links" in said and not (copied_place / "gone").exists()
    if name == "report.html":
        refuse(copied_place, ["report", folder], ["report.html is a link to "])


@pytest.mark.parametrize("name", [".{}.lock", ".{}.owner"])
def test_a_link_beside_a_run_folder(copied_place, refuse, name):
    folder = run_folder(copied_place, "short")
    (copied_place / "secret").write_text("kept")
    (folder.parent / name.format(folder.name)).unlink(missing_ok=True)
    (folder.parent / name.format(folder.name)).symlink_to(copied_place / "secret")
    with pytest.raises(UserError, match=r"is a link to .*secret"), alone(folder):
        pass
    assert (copied_place / "secret").read_text() == "kept"


def test_the_folder_of_another_behind_a_run_folders_name(copied_place, refuse):
    folder = run_folder(copied_place, "short")
    with pytest.raises(UserError, match=r"is a link to .*text"):
        shutil.rmtree(folder)
        (copied_place / "text").mkdir()
        folder.symlink_to(copied_place / "text")
        RunDir.at(folder, recipe_of(copied_place, "short"), fresh=True)
    folder.unlink()
    moved = shutil.copytree(run_folder(copied_place, "half"), copied_place / "moved")
    run_folder(copied_place, "half").rename(copied_place / "old")
    folder = copied_place / "runs" / f"half-{recipe_of(copied_place, 'half').fingerprint}"
    folder.symlink_to(moved)
    assert RunDir.at(folder, recipe_of(copied_place, "half"), fresh=False).recipe().name == "half"  # a run that was moved


def recipe_of(place, name):
    return check(yaml.safe_load((place / f"{name}.yaml").read_text()), name)


OUT = [
    (
        ["report", "runs/finished", "--out", "tiny.yaml"],
        ["tiny.yaml, which exists and is not a report; name another"],
    ),
    (
        ["report", "runs/finished", "--out", "out/config.json"],
        ["out/config.json, which exists and is not a report"],
    ),
    (["report", "runs/finished", "runs/stopped", "--out", "short.yaml"], ["short.yaml, which exists and is not a report"]),
    (["plan", "tiny.yaml", "--json", "tiny.yaml"], ["--json is tiny.yaml, which exists and is not JSON; name another file"]),
    (["recipes", "ls", "--json", "short.yaml"], ["--json is short.yaml, which exists and is not JSON"]),
    (["doctor", "--json", "out/model.safetensors"], ["out/model.safetensors, which exists and is not JSON"]),
    (["eval", "runs/finished", "--json", "runs/finished/evaluations.json"], ["which is a file of a run or a model; name"]),
    (["plan", "tiny.yaml", "--json", "out/config.json"], ["--json is out/config.json, which is a file of a run or a model"]),
    (["plan", "tiny.yaml", "name=" + "x" * 201], ["it should be a name that a folder may have, of 200 bytes at most"]),
    (["eval", "runs/finished", "--json", "runs"], ["--json is runs, which is a folder; name a file"]),
    (["recipes", "show", "/etc/passwd"], ["there is no shipped recipe '/etc/passwd'; choose from"]),
    (["recipes", "show", "tiny.yaml"], ["there is no shipped recipe 'tiny.yaml'"]),
    (["recipes", "show", "../recipes/quickstart.yaml"], ["there is no shipped recipe '../recipes/quickstart.yaml'"]),
    (["recipes", "cp", "short.yaml", "x.yaml"], ["there is no shipped recipe 'short.yaml'"]),
    (["recipes", "show", "x" * 300], ["there is no shipped recipe 'xxx"]),
    (["plan", "x" * 5000], ["there is no recipe 'xxx", "no such file"]),
    (["report", "x" * 5000], ["xxx is no run folder: it has no recipe.yaml"]),
    (["eval", "x" * 5000], ["xxx cannot be loaded as a student: there is no such folder"]),
    (["run", "short.yaml", "--runs", "x" * 300], ["xxx", "cannot be ", "File name too long"]),
]


@pytest.mark.parametrize(("arguments", "parts"), OUT, ids=lambda value: " ".join(value)[:60])
def test_files_that_are_not_ours(place, refuse, arguments, parts):
    refuse(place, arguments, parts)


@pytest.mark.parametrize("verb", ["report", "plan", "recipes"])
def test_devices_and_pipes_are_not_replaced(copied_place, refuse, verb):
    """A file that took the name of a device would take the device from the machine."""
    os.mkfifo(copied_place / "pipe")
    folder = run_folder(copied_place, "short")
    commands = {
        "report": ["report", folder, "--out"],
        "plan": ["plan", "tiny.yaml", "--json"],
        "recipes": ["recipes", "ls", "--json"],
    }
    refuse(copied_place, [*commands[verb], "pipe"], ["pipe is not a plain file, and is not overwritten; name another"])
    assert (copied_place / "pipe").is_fifo()


def test_a_report_may_be_written_over(copied_place):
    (copied_place / "empty.html").touch()
    for _ in range(2):
        assert (
            distill.report("runs/" + run_folder(copied_place, "short").name, out="empty.html").read_text().startswith("<!do")
        )


def test_links_where_files_are_written(copied_place, refuse):
    folder = run_folder(copied_place, "short")
    for name in ("dangling.yaml", "dangling.json", "dangling.html", "dangling"):
        (copied_place / name).symlink_to(copied_place / "made")
    for arguments in (
        ["recipes", "cp", "quickstart", "dangling.yaml"],
        ["recipes", "ls", "--json", "dangling.json"],
        ["report", folder, "--out", "dangling.html"],
        ["export", folder, "--out", "dangling"],
        ["select", "tiny.yaml", "--keep", "1", "--write", "dangling.yaml"],
    ):
        refuse(copied_place, arguments, ["dangling"])
    (folder / "student" / "notes.txt").symlink_to("/etc/passwd")
    refuse(copied_place, ["export", folder, "--out", "new"], ["notes.txt is a link, and an export holds"])
    assert not (copied_place / "made").exists() and not (copied_place / "new").exists()


# names


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (r'name="a\0b"', r"name is 'a\x00b', which holds the unprintable character '\x00'"),
        (r'name="\e[31mred"', r"name is '\x1b[31mred', which holds the unprintable character '\x1b'"),
        (r'teacher="\u202Egpj"', r"teacher is '\u202egpj'"),
        (r'data.train.0.path="\x07"', r"data.train.0.path is '\x07'"),
        (r'mixers.M.mixer="\ud800"', r"mixers.M.mixer is '\ud800'"),
        (r'stages.0={"\x9b": {}}', r"a key is '\x9b', which holds"),
        ("name=a/b", "a name that a folder may have"),
    ],
)
def test_names_that_bite(place, refuse, override, said):
    assert "\x1b" not in refuse(place, ["plan", "tiny.yaml", override], [said, "tiny.yaml: "])


@pytest.mark.parametrize("name", ["[red]x", "[bold]", "[link=x]y[blink]", ":smile:", "a b'c"])
def test_names_are_shown_as_they_are(place, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["distill", "plan", "tiny.yaml", f"name={json.dumps(name)}"])
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert not ended.value.code and name in capsys.readouterr().out


def test_tables_and_messages_act_on_nothing():
    shown = io.StringIO()
    console = PlainConsole(file=shown, force_terminal=True, width=100)
    table = Table("[b]head[/b]")
    table.add_row("\x1b]8;;http://x\x07[red]cell\0\ud800")
    console.print(table)
    console.print("[/]", bold("\x1b[2J[i]"))
    said = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    assert not HIDDEN.search(said) and "[b]head[/b]" in said and "[/] " in said and r"\x1b[2J[i]" in said
    assert r"\x1b]8;;http://x\x07[red]cell\x00\ud800" in said
