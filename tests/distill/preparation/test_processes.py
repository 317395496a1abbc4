"""Processes that prepare text: killed, waiting for each other, and how many there are."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from distill.errors import UserError
from distill.text import pieces, shards, tokenising
from distill.text.preparation import Tokenising, prepare
from tests.distill.preparation.preparing import content


def work(tokenizer, source, cache, processes, at_it, go_on, said):
    """What a killed process does: prepares, and waits in the middle of the third shard."""
    os.environ["DISTILL_CACHE"] = str(cache)
    sys.stderr = said.open("w", buffering=1)
    add = shards.Writer.add

    def waiting(self, *given):
        if self.shards == 2 and self.open and not at_it.is_set():
            at_it.set()
            go_on.wait()
        add(self, *given)

    shards.Writer.add = waiting
    options = {"separator": None, "seed": 3, "limit": None, "where": "data.train", "how": Tokenising(processes)}
    try:
        prepare([source], tokenizer, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@pytest.fixture
def begun(tokenizer, sources, tmp_path):
    """Processes that prepare: each with what lets it go on, and the file of its standard error."""
    context, processes = multiprocessing.get_context("fork"), []

    def begun(count=1, waits=True):
        at_it, go_on, said = context.Event(), context.Event(), tmp_path / f"said {len(processes)}"
        arguments = (tokenizer, sources["local"][1], tmp_path / "parts", count, at_it, go_on, said)
        process = context.Process(target=work, args=arguments)
        processes.append(process)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            process.start()
        assert not waits or at_it.wait(60), said.read_text()
        return process, go_on, said

    yield begun
    for process in processes:
        process.kill()


def children(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_kill_9_in_the_middle_of_a_shard(prepared, sources, begun, tmp_path):
    """What is whole stays; the processes that tokenise end too; whoever comes goes on to the same bytes."""
    process, _, _ = begun(2)
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    process.join()
    (left,) = (tmp_path / "parts" / "prepared").glob(".unfinished-*")
    assert {"00000", "00001", ".writing"} <= {path.name for path in left.iterdir()}
    until = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    stamp = (left / "00001" / "tokens.npy").stat().st_ino
    parts = prepared(sources["local"][1:], "parts")
    assert content(parts) == content(prepared(sources["local"][1:], "whole")) and not left.exists()
    assert (parts / "00001" / "tokens.npy").stat().st_ino == stamp


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_a_killed_worker_is_one_message(prepared, sources, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 2)
    process, go_on, said = begun(2)
    for worker in children(process):
        os.kill(worker, signal.SIGKILL)
    go_on.set()
    process.join(60)
    assert process.exitcode == 2
    wanted = "error: a process that tokenises was killed from outside, perhaps because memory ran out; give the same command"
    assert said.read_text().startswith(wanted) and said.read_text().count("\n") == 1
    assert content(prepared(sources["local"][1:], "parts")) == content(prepared(sources["local"][1:], "whole"))


def test_two_at_once(prepared, sources, begun, tmp_path):
    """The second waits and says for whom, and finds what the first made."""
    first, go_on, _ = begun()
    second, _, said = begun(waits=False)
    until = time.monotonic() + 30
    while not (said.exists() and said.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert said.read_text().startswith(f"data.train: process {first.pid} on ") and "; waiting for it" in said.read_text()
    go_on.set()
    first.join(60), second.join(60)
    assert first.exitcode == second.exitcode == 0 and said.read_text().count("\n") == 1
    (made,) = (tmp_path / "parts" / "prepared").iterdir()
    assert content(made) == content(prepared(sources["local"][1:], "whole"))


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(tokenising, "usable_cores", lambda: 16)
    monkeypatch.setattr(tokenising.sys, "platform", "linux")
    assert [tokenising.processes_for(size) for size in (1000, None, 10**9)] == [1, 16, 16]
    assert tokenising.processes_for(1000, 5) == 5 and tokenising.processes_for(None, 1) == 1
    monkeypatch.setattr(tokenising.sys, "platform", "darwin")
    assert tokenising.processes_for(None) == 1
    monkeypatch.setattr(tokenising.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UserError, match="--processes is 4, but this system cannot fork processes; leave it out"):
        tokenising.processes_for(None, 4)
