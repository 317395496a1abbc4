"""Several processes: started as requested or refused, one message for all, and a run that goes on with another number."""

import io
import json
import subprocess
import sys

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import distill
from distill import cli, processes
from distill.errors import UserError
from distill.runs import checkpoint
from distill.runs.checkpoint import RunState
from tests.distill.two_processes import STOPPED, in_two

# Several calls in one script. The second recipe is refused by both processes.
SWEEP = """
import sys
import distill
from distill.errors import UserError

recipe, runs, cache = sys.argv[1:]
distill.cache(recipe, out=cache, top_k=8)
try:
    distill.run(recipe, overrides="data.batch=3", runs=runs)
except UserError as error:
    print(f"refused: {error}")
for seed in (1, 2):
    distill.run(recipe, overrides=f"seed={seed}", runs=runs)
"""
# What a process does at its exit, once it is in a group.
LEAVING = """
import sys
import torch.distributed as dist
from distill import processes
from distill.cli import entry

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
processes.leave_at_exit()
leave = dist.destroy_process_group
dist.destroy_process_group = lambda: (leave(), print("left"))
"""


@pytest.fixture
def recipe(tmp_path, tiny_recipe):
    """The file of a short recipe."""
    tiny_recipe["stages"] = [tiny_recipe["stages"][0], {"align": {"tokens": 768, "lr": 1e-3}}]
    tiny_recipe["evaluation"] |= {"passkey": [], "documents": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return tmp_path / "tiny.yaml"


def test_two_processes_refuse_once(recipe, tmp_path):
    """Both find it out, before a teacher is loaded and a layout selected."""
    overrides = ["data.batch=3", "pattern={keep: 1, by: kl, length: 64}"]
    code, said = in_two("-m", "distill.cli", "run", str(recipe), *overrides, "--runs", str(tmp_path / "runs"))
    assert code and said.count("error: ") == 1, said
    assert "data.batch is 3, and a batch of 3 windows cannot be shared by 2 processes; make it a multiple of 2" in said
    assert not list(tmp_path.glob("runs/*"))


def test_another_process_waits_before_it_speaks(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("distill.cli.time.sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["distill", "plan", "no-such-recipe"])
    for rank, seconds in (("0", []), ("1", [cli.PATIENCE])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            cli.entry()
        assert waited == seconds and "there is no recipe 'no-such-recipe'" in capsys.readouterr().err


def test_a_run_goes_on_with_another_number(recipe, tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    code, said = in_two(str(tmp_path / "stopped.py"), str(recipe), str(tmp_path / "runs"))
    assert code == 0, said
    (folder,) = (tmp_path / "runs").glob("tiny-*")
    assert checkpoint.read_state(checkpoint.latest(folder / "checkpoints")).processes == 2
    written = io.StringIO()
    done = distill.run(recipe, runs=tmp_path / "runs", console=Console(file=written, width=400))
    told = written.getvalue()
    assert "the steps so far were taken with processes=2, and the next ones with processes=1" in told
    assert done.path == folder and done.read("run.json")["finished"]
    alone = distill.run(recipe, runs=tmp_path / "alone", console=Console(file=io.StringIO()))
    found, wanted = (load_file(run.student / "model.safetensors") for run in (done, alone))
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


def test_a_script_makes_several_calls(recipe, tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP)
    entries = yaml.safe_load(recipe.read_text())
    entries["stages"].append({"imitate": {"tokens": 256, "lr": 1e-3}})
    recipe.write_text(yaml.safe_dump(entries))
    code, said = in_two(str(tmp_path / "sweep.py"), str(recipe), str(tmp_path / "runs"), str(tmp_path / "cache"))
    assert code == 0, said
    assert said.count("refused: ") == 2
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/run.json"))]
    assert len(runs) == 2 and all(run["finished"] for run in runs)


@pytest.mark.parametrize(
    ("end", "left", "code"),
    [
        ("", True, 0),
        ("sys.exit(3)", True, 3),
        ("raise ValueError", False, 1),
        ("sys.argv = ['distill', '--version']; entry()", True, 0),
        ("sys.argv = ['distill', 'plan', 'no-such-recipe']; entry()", False, 2),
        ("sys.argv = ['distill', 'no-such-verb']; entry()", False, 2),
    ],
)
def test_a_process_leaves_its_group_unless_it_failed(end, left, code):
    """Threads of gloo can abort a process that exits without leaving; one that failed could wait for the others for ever."""
    done = subprocess.run([sys.executable, "-c", LEAVING + end], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "left" in done.stdout) == (code, left), done.stderr


def test_states_of_before_keep_their_digest():
    """A checkpoint that names no number of processes is what it was, and one that does cannot be edited."""
    state = RunState(1, "align", 3, False, 0, "t", recipe="r")
    before = state.hashed()
    state.processes = 2
    assert state.hashed() != before
    state.processes = 0
    assert state.hashed() == before == ("2610f4c55374aaadd8056eee16a2bf777af4fce3afdb34d320d20cedb946d5a5")


# what accelerate launch starts


@pytest.fixture
def alone(monkeypatch):
    """An environment that says nothing of processes."""
    for name in (*processes.SIZES, *processes.RANKS, processes.SEVERAL, processes.BY_ACCELERATE):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch, *arguments):
    """The environment that `accelerate launch` gives the one process that it starts."""
    from accelerate.commands import launch

    asked = launch.launch_command_parser().parse_args([*arguments, "script.py"])
    asked, *_ = launch._validate_launch_command(asked)
    _, environment = launch.prepare_simple_launcher_cmd_env(asked)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_one_process_where_several_were_asked_for(recipe, alone, monkeypatch):
    launched(monkeypatch, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    for verb in (distill.plan, distill.run):
        with pytest.raises(UserError, match=r"asked for several processes and started one.*torchrun --nproc-per-node 2 -m"):
            verb(recipe)


def test_one_process_where_one_was_asked_for(recipe, alone, monkeypatch):
    launched(monkeypatch, "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
    assert distill.plan(recipe).tokens
    monkeypatch.setenv(processes.SEVERAL, "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun says it, which accelerate launch --multi_gpu starts
    assert distill.plan(recipe).tokens and processes.count() == 2
    monkeypatch.setenv("RANK", "1")
    assert processes.rank() == 1


def test_odd_numbers_of_processes_are_none(alone, monkeypatch):
    for odd in ("", "two", "-1", "0", "²", "1.5"):
        monkeypatch.setenv("WORLD_SIZE", odd)
        assert processes.count() == 1
