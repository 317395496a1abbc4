"""Machines that lack a GPU, memory, room on the disk or the right to write, and folders that another process uses."""

import errno
import os
import subprocess
import sys

import pytest
import torch

import distill
from distill.errors import Interrupted, UserError
from distill.evaluation import judging
from distill.runs import checkpoint
from distill.runs.stopper import Stopper
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.initialise import Initialise
from tests.distill.mistakes.conftest import hashes

GPU_SAYS = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"
CPU_SAYS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(place, refuse):
    refuse(place, ["run", "tiny.yaml", "device=cuda"], ["device is 'cuda', but PyTorch sees no GPU here", "device=auto"])


def failing(error):
    def fail(*arguments, **keywords):
        raise error

    return fail


@pytest.mark.parametrize(
    ("stage", "method", "error", "parts"),
    [
        (Initialise, "begin", torch.OutOfMemoryError(GPU_SAYS), ["stage initialise", "lower data.micro_batch (now 4"]),
        (Align, "losses", torch.OutOfMemoryError(GPU_SAYS), ["stage align", "stages.align.micro_batch (now 4 windows"]),
        (Align, "losses", RuntimeError(CPU_SAYS), ["stage align", "or data.seq_len (now 32 tokens)", "can't allocate"]),
        (Imitate, "losses", MemoryError(), ["stage imitate", "set stages.imitate.activation_checkpointing=true"]),
    ],
    ids=["initialise", "align on a GPU", "align on a CPU", "imitate"],
)
def test_out_of_memory_in_a_stage(copied_place, monkeypatch, refuse, stage, method, error, parts):
    monkeypatch.setattr(stage, method, failing(error))
    monkeypatch.setattr("distill.training.saves.probe", lambda *arguments: {})  # it measures the stages' losses too
    short = {
        Initialise: ["tiny.yaml"],
        Align: ["half.yaml"],  # goes on in the middle of align
        Imitate: ["tiny.yaml", "stages=[{initialise: {tokens: 128}}, {imitate: {tokens: 128, lr: 1e-3}}]"],
    }
    refuse(copied_place, ["run", *short[stage]], [*parts, "ran out of memory: lower "])


@pytest.mark.parametrize(
    ("command", "place_of_it", "parts"),
    [
        (["run", "tiny.yaml"], "distill.runs.session.load_teacher", ["loading ", "choose a smaller one"]),
        (
            ["run", "tiny.yaml"],
            "distill.training.runner.fidelity",
            ["judging the untrained windows ran out", "evaluation.tokens (now 256)"],
        ),
        (
            ["run", "tiny.yaml"],
            "distill.text.preparation._write",
            ["data.heldout: preparing the text ran out of memory", "lower data.longest_document"],
        ),
        (["eval", "runs/finished"], "distill.evaluation.judging.judge_all", ["judging runs/finished", "--suite (now quick"]),
        (["generate", "runs/finished", "hi"], "distill.generation.load_student", ["generating with", "--tokens (now 64)"]),
    ],
    ids=["loading", "the bar", "the text", "judging", "generating"],
)
def test_out_of_memory_elsewhere(place, tmp_path, monkeypatch, refuse, command, place_of_it, parts):
    """What is named to be lowered is what helps there: micro-batches do not, outside of a stage."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(place_of_it, failing(torch.OutOfMemoryError(GPU_SAYS)))
    runs = ["--runs", tmp_path] if command[0] == "run" else []
    said = refuse(place, [*command, *runs], [*parts, "ran out of memory: lower "])
    assert "micro_batch" not in said


def test_what_to_lower_can_be_typed(place, monkeypatch, tmp_path):
    """Of two stages of a name the number says which, as overrides do; micro-batches of one window get no smaller."""
    monkeypatch.setattr(Align, "losses", failing(MemoryError()))
    monkeypatch.setattr("distill.training.saves.probe", lambda *arguments: {})
    twice = "stages=[{initialise: {tokens: 128}}, {align: {tokens: 128, lr: 1e-3}}, {align: {tokens: 128, lr: 1e-3}}]"
    with pytest.raises(UserError, match=r"lower stages\.1\.micro_batch \(now 4 windows at a time\) or data\.seq_len"):
        distill.run("tiny.yaml", overrides=[twice], runs=tmp_path)
    assert distill.plan("tiny.yaml", overrides=[twice, "stages.1.micro_batch=2"]).tokens["align (2)"] == 128
    with pytest.raises(UserError, match=r"stage align ran out of memory: lower data\.seq_len \(now 32 tokens\)\. \("):
        distill.run("tiny.yaml", overrides=[twice, "data.micro_batch=1"], runs=tmp_path)


def test_another_error_is_no_lack_of_memory(place, monkeypatch):
    monkeypatch.setattr(judging, "judge_all", failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        distill.evaluate("runs/finished")


# disks

LIMITED = """
import resource, signal, sys
from distill import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing past the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
cli.entry()
"""


def test_a_disk_that_takes_no_more(copied_place, monkeypatch):
    """A real process that may write no file above 30 KB: the next checkpoint does not fit, and the last one stays."""
    (folder,) = (copied_place / "runs").glob("half-*")
    newest = checkpoint.latest(folder / "checkpoints")
    before = hashes(newest)
    command = [sys.executable, "-c", LIMITED, "30000", "run", "half.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "300"})
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "Traceback" not in said, said
    assert "error: " in said and "could not be written" in said and os.strerror(errno.EFBIG) in said, said
    assert "earlier ones are untouched: make room there or use another folder" in said
    assert hashes(newest) == before and checkpoint.latest(folder / "checkpoints") == newest
    monkeypatch.setattr(Stopper, "due", lambda self: "enough")
    with pytest.raises(Interrupted, match="enough in stage align"):  # with room, the same command goes on
        distill.run("half.yaml", runs="runs")


def test_a_full_disk(place, small_disk, refuse):
    (small_disk / "filler").write_bytes(b"x" * 300_000)
    said = refuse(place, ["run", "half.yaml", "--runs", small_disk / "runs"], [os.strerror(errno.ENOSPC), "make room there"])
    assert str(small_disk) in said
    said = refuse(place, ["export", "runs/finished", "--out", small_disk / "out"], [os.strerror(errno.ENOSPC), "make room"])
    assert not (small_disk / "out").exists() and (small_disk / "filler").exists()


def test_a_read_only_disk(place, small_disk, refuse):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refuse(place, ["run", "half.yaml", "--runs", small_disk / "runs"], [os.strerror(errno.EROFS), "--runs"])
    refuse(place, ["export", "runs/finished", "--out", small_disk / "out"], [os.strerror(errno.EROFS), "another folder"])
    refuse(place, ["recipes", "cp", "quickstart", small_disk], [os.strerror(errno.EROFS), "use another folder"])
    refuse(place, ["eval", "runs/finished", "--json", small_disk / "n.json"], [os.strerror(errno.EROFS)])


@pytest.mark.parametrize("runs", ["tiny.yaml", "tiny.yaml/runs", "/proc/runs"])
def test_a_place_where_no_folder_can_be(place, refuse, runs):
    refuse(place, ["run", "half.yaml", "--runs", runs], ["cannot be ", "choose another folder with --runs"])


# two processes

HOLDER = """
import sys, time
from distill.runs.run_dir import alone
with alone(sys.argv[1]):
    print(1, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("arguments", [[], ["--fresh"]], ids=["again", "fresh"])
def test_two_processes_in_one_run_folder(copied_place, refuse, arguments):
    (folder,) = (copied_place / "runs").glob("half-*")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        said = refuse(copied_place, ["run", "half.yaml", *arguments], [f"is in use by process {process.pid} on "])
        assert "wait for it, or stop it first" in said
    finally:
        process.kill()
        process.wait()


def test_the_python_api_says_the_same(place, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be .*choose another folder with --runs"):
        distill.run("half.yaml", runs="tiny.yaml")
    monkeypatch.setattr("distill.runs.session.load_teacher", failing(torch.OutOfMemoryError(GPU_SAYS)))
    with pytest.raises(UserError, match="ran out of memory: lower"):
        distill.run("half.yaml", runs=tmp_path)
