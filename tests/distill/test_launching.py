"""A command that starts its own processes: refusals, one message about what ended them, signals, and a run that goes on
from a checkpoint in parts with another number of processes."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import distill
from distill import launching, processes
from distill.errors import Ended, Interrupted, UserError
from distill.launching import Group, count_of, environment
from distill.recipe import Recipe
from distill.runs import checkpoint
from distill.runs.session import check_windows
from distill.runs.stopper import Stopper
from distill.runs.together import check_backends

# what is refused


@pytest.fixture
def recipe(tiny_recipe):
    """A function that makes the tiny recipe with some keys changed."""
    return lambda **changes: Recipe(**tiny_recipe | changes)


def test_nothing_is_launched_unasked(recipe):
    assert count_of(None, None, recipe()) == 1 and count_of(None, 1, recipe()) == 1 and count_of(None, 3, recipe()) == 3


@pytest.mark.parametrize(
    ("gpus", "count", "device", "said"),
    [
        (2, 2, "auto", "--gpus 2 and --processes 2: a run has one process for each GPU; give only one"),
        (0, None, "auto", "--gpus is 0; it takes"),
        (None, -1, "cpu", "--processes is -1; it takes"),
        (2, None, "cpu", "--gpus is 2, but device is 'cpu'; set device=auto, or use --processes 2"),
        (64, None, "auto", "--gpus is 64, but PyTorch sees .* here; "),
        (None, 2, "cuda", "--processes is 2, which is for CPUs, but device is 'cuda'"),
    ],
)
def test_processes_that_cannot_be_had(recipe, gpus, count, device, said):
    with pytest.raises(UserError, match=said):
        count_of(gpus, count, recipe(device=device))


def test_two_launchers_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"--processes is 2, but this is already one of 4 processes that a launcher started"):
        count_of(None, 2, recipe())


@pytest.mark.parametrize(("gpu", "name"), [(True, "NCCL"), (False, "gloo")])
def test_nothing_to_talk_through(monkeypatch, gpu, name):
    monkeypatch.setattr(f"torch.distributed.is_{name.lower()}_available", lambda: False)
    with pytest.raises(UserError, match=rf"this PyTorch \(.*\) has no {name}, which several processes need; use one"):
        check_backends(gpu)


def test_more_processes_than_windows(tiny_recipe, tmp_path):
    check_windows(3, 32, 3)
    with pytest.raises(UserError, match=r"data.train is 3 windows of 32 tokens, fewer than the 4 processes of this run"):
        check_windows(3, 32, 4)


def test_it_refuses_before_anything_is_started(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", None)
    with pytest.raises(UserError, match=r"data.batch is 4, and a batch of 4 windows cannot be shared by 3 processes"):
        distill.run(tiny_recipe, runs=tmp_path, processes=3)
    assert not list(tmp_path.iterdir())


def test_plan_says_what_gpus_divide(tiny_recipe):
    assert distill.plan(tiny_recipe).shard is None
    planned = distill.plan(tiny_recipe | {"shard": "all"}, gpus=2).shard
    assert planned["kind"] == "all" and planned["gpus"] == 2 and "GiB a device" in planned["why"]
    assert distill.plan(tiny_recipe, gpus=4).shard["kind"] == "none"
    with pytest.raises(UserError, match=r"data.batch is 4, and a batch of 4 windows cannot be shared by 8 processes"):
        distill.plan(tiny_recipe, gpus=8)


# what ends processes


def ended(script, world=2, during=None, capfd=None):
    """How a group of small programs ends: exit code, what is said beside what the first said."""
    with ExitStack() as stack:
        group = Group.started([sys.executable, "-c", textwrap.dedent(script)], world, stack)
        with group.signals():
            if during is not None:
                threading.Timer(0.5, during).start()
            found = group.supervise()
    assert all(member.poll() is not None for member in group.members)
    return found


HEAD = "import os, sys, time, signal; rank = int(os.environ['RANK'])\n"


def test_all_end_well():
    assert ended(HEAD + "assert os.environ['WORLD_SIZE'] == '3' and os.environ['DISTILL_LAUNCHED']", 3) == (0, "")


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("if rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)", 1, "error: process 1 of 2 was killed by SIGKILL"),
        ("if rank == 0: os.kill(os.getpid(), 9)\ntime.sleep(60)", 1, "error: process 0 of 2 was killed by SIGKILL"),
        ("if rank == 1: sys.exit('error: what')\ntime.sleep(60)", 1, "error: process 1 of 2 ended with exit code 1"),
        ("if rank == 0: sys.exit(2)\ntime.sleep(60)", 2, ""),
        ("if rank == 1: print('noise\\nerror: x is 3', file=sys.stderr); sys.exit(2)\ntime.sleep(60)", 2, "error: x is 3"),
        ("if rank == 1: print('error: x'); sys.exit(2)\ntime.sleep(0.4)\nsys.exit(2)", 2, ""),  # the first speaks
        ("time.sleep(0.2 * rank)\nsys.exit(3)", 3, ""),
        ("sys.exit(0 if rank else 5)", 5, "error: process 0 of 2 ended with exit code 5"),
    ],
)
def test_one_message_of_what_ended_them(monkeypatch, script, code, said):
    monkeypatch.setattr(launching, "GRACE", 1.0)
    began = time.monotonic()
    found, told = ended(HEAD + script)
    assert found == code and time.monotonic() - began < 20
    assert told.count("error: process") == ("error: process" in said) and said in told
    assert ("noise" in told) is False
    if code == 1:
        assert "the others were stopped; the same command goes on from the last checkpoint" in told


def test_signals_reach_all_once(tmp_path):
    script = f"""
    def note(number, frame):
        open({str(tmp_path)!r} + f"/{{rank}}", "a").write("x")
        sys.exit(3)
    signal.signal(signal.SIGINT, note)
    time.sleep(60)
    """
    found, told = ended(HEAD + textwrap.dedent(script), during=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (found, told) == (3, "")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "x", "1": "x"}


def test_a_process_follows_its_launcher(tmp_path):
    """One whose launcher was killed is asked to terminate."""
    script = (
        "from distill import processes; import time; processes.follow_launcher(); print('on', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"on\n" and child.poll() is None
    child.stdin.close()
    assert child.wait(30) == -signal.SIGTERM
    child.stdout.close()


def test_an_environment_says_what_torchrun_says(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = environment(1, 2, 4567)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_PORT"], found["LOCAL_RANK"]) == ("1", "2", "4567", "1")
    assert found["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2)) and found[processes.LAUNCHED] == "1"


# one, two, one

KILLED = """
import os, sys
def hook(event, arguments):
    if event == "open" and "imitate-0000006/parts-00002" in str(arguments[0]) and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), 9)
sys.addaudithook(hook)
"""


def quiet():
    return Console(file=io.StringIO(), width=400)


def test_one_then_two_then_one(tiny_recipe, tmp_path, monkeypatch, capfd):
    """One process stopped; two that divide the student, of which one is killed while it saves; a damaged part; one again.
    The losses are those of a run that nothing happened to."""
    tiny_recipe["stages"] = [tiny_recipe["stages"][0], {"imitate": {"tokens": 1024, "lr": 1e-3, "train": "all"}}]
    tiny_recipe |= {"shard": "student", "checkpoints": {"steps": 1, "keep": 3}}
    tiny_recipe["evaluation"] |= {"passkey": [], "documents": 1}
    alone = distill.run(tiny_recipe, runs=tmp_path / "alone", console=quiet())

    with monkeypatch.context() as patch:
        asked = iter(range(1000))
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == 1 else None)
        with pytest.raises(Interrupted):
            distill.run(tiny_recipe, runs=tmp_path / "runs", console=quiet())

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(Ended) as end:
        distill.run(tiny_recipe, runs=tmp_path / "runs", processes=2)
    said = capfd.readouterr().err
    assert end.value.code == 1 and said.count("error:") == 1
    assert "error: process 1 of 2 was killed by SIGKILL" in said and "Traceback" not in said
    assert "taken with processes=1, and the next ones with processes=2" in " ".join(said.split())
    monkeypatch.delenv("PYTHONPATH")

    (folder,) = (tmp_path / "runs").glob("tiny-*")
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest.name == "1-imitate-0000005" and checkpoint.read_state(newest).processes == 2
    parts = sorted(path.name for path in newest.glob("*-of-00002.*"))
    assert [name.partition("-")[0] for name in parts] == [
        kind for kind in ("optimizer", "parts", "rng", "student") for _ in "12"
    ]
    damaged = newest / "optimizer-00002-of-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))

    console = quiet()
    done = distill.run(tiny_recipe, runs=tmp_path / "runs", console=console)
    told = console.file.getvalue()
    assert "optimizer-00002-of-00002.safetensors is damaged; set aside as .damaged-1-imitate-0000005" in told
    assert "going on after step 4 of stage imitate" in told
    losses = [[(line["step"], line["loss"]) for line in run.metrics()] for run in (done, alone)]
    assert [step for step, _ in losses[0]] == list(range(1, 9))
    assert [loss for _, loss in losses[0]] == pytest.approx([loss for _, loss in losses[1]], rel=1e-5)
    found, wanted = (load_file(run.student / "model.safetensors") for run in (done, alone))
    assert found.keys() == wanted.keys() and all(torch.allclose(found[n], wanted[n], atol=1e-5) for n in wanted)
    assert json.loads((done.path / "run.json").read_text())["finished"]
    assert yaml.safe_load((done.path / "recipe.yaml").read_text())["shard"] == "student"
