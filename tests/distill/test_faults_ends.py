"""Faults outside the stages: a selection, a twin, an evaluation, a report and an export are killed; one of several
processes of a run is killed; another number of processes goes on with a run."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import distill
from distill.training.trainer import Trainer
from tests.distill.test_faults import PRELOADED
from tests.fuzz import place

# Where a run is killed: the file whose writing or moving is the moment, and the how manieth of its kind.
MOMENTS = {
    "selection begins": (r"/\.?selection\.json", 1),
    "selection goes on": (r"/\.?selection\.json", 9),
    "the layout is chosen": (r"/\.?resolved\.yaml", 2),
    "the twin trains": (r"/twin/checkpoints/", 4),
    "the twin is saved": (r"/twin/\.?student", 2),
    "what was judged is written": (r"/(?<!twin/)\.?evaluations\.json", -1),
    "the report is written": (r"/\.?report\.html", 1),
    "the report is half written": (r"/\.?report\.md", 1),
    "the export begins": (r"/export/", 1),
    "the export goes on": (r"/export/", 30),
}


def take(folder: str, runs: str, at: tuple | int | None = None, world: tuple | None = None) -> None:
    """What a process does: the whole recipe. at: where it kills itself (`killer`), or after how many steps. world: its rank,
    how many there are, and their port."""
    os.chdir(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    torch.set_num_threads(1)
    if world is not None:
        rank, size, port = (str(part) for part in world)
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    if isinstance(at, int):
        kill_after(at)
    elif at is not None:
        sys.addaudithook(killer(*at))
    distill.run("every.yaml", runs=runs)


def kill_after(steps: int) -> None:
    """Kill this process in the middle of its training, before it takes one step more."""
    step, taken = Trainer.step, iter(range(10_000))

    def counted(self, *arguments):
        if next(taken) == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    Trainer.step = counted


def killer(pattern: str, number: int):
    """An audit hook that kills this process at the so-manieth opening for writing, or moving, of a file of such a name.
    -1: at the last one, after which nothing is left but the report."""
    seen = []

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            name = arguments[0]
        elif event in ("os.rename", "os.mkdir"):
            name = os.fspath(arguments[0])
        else:
            return
        if re.search(pattern, os.path.abspath(name)):
            seen.append(name)
            last = number == -1 and '"final"' in (Path(name).read_text() if event == "os.rename" else "")
            if len(seen) == number or last:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def start(*arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=take, args=arguments)
    process.start()
    return process


def ended(process, seconds: float = 900) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def together(folder: Path, runs: Path, size: int, killed: int | None = None, at: tuple | int | None = None) -> list[int]:
    """The exit codes of processes that share a run; one of them may kill itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(str(folder), str(runs), at if rank == killed else None, (rank, size, port)) for rank in range(size)]
    return [ended(process) for process in [start(*one) for one in arguments]]


def outcome(runs: Path) -> dict:
    """What a run ends with, without times: weights, losses, what was selected, judged and exported."""
    (folder,) = runs.glob("every-*")
    weights = {
        name: load_file(folder / name / "model.safetensors") for name in ("student", "twin/student", "export/portable")
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    chosen = json.loads((folder / "selection.json").read_text())["chosen"]
    rows = json.loads((folder / "evaluations.json").read_text())["final"]["rows"]
    assert "<html" in (folder / "report.html").read_text()
    assert (folder / "report.md").read_text()
    return {
        "weights": {f"{part} {name}": tensor for part, found in weights.items() for name, tensor in found.items()},
        "losses": [(line["stage"], line["step"], line["loss"]) for line in lines],
        "chosen": [(one["name"], one["score"], one["kept"]) for one in chosen["ranking"]],
        "judged": {name: row["fidelity"]["kl"] for name, row in rows.items()},
        "left over": sorted(path.name for path in folder.rglob(".*") if not path.name.startswith(".exported")),
    }


def assert_same(one: dict, other: dict) -> None:
    for name in ("losses", "chosen", "judged", "left over"):
        assert one[name] == other[name], name
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a teacher, text, and a recipe that has everything: selection, four stages, twin, export."""
    folder = tmp_path_factory.mktemp("made") / "place"
    process = multiprocessing.get_context("forkserver").Process(target=place.make, args=(folder,))
    process.start()
    assert ended(process) == 0
    entries = yaml.safe_load((folder / "every.yaml").read_text())
    entries["data"]["batch"] = 2
    (folder / "every.yaml").write_text(yaml.safe_dump(entries))
    return folder


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """What the run ends with when nobody disturbs it."""
    runs = tmp_path_factory.mktemp("whole")
    assert ended(start(str(made), str(runs))) == 0
    return outcome(runs)


@pytest.mark.faults
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_its_ends_and_gone_on_with(made, whole, tmp_path, moment):
    assert ended(start(str(made), str(tmp_path), MOMENTS[moment])) == -9, "the moment never came"
    assert ended(start(str(made), str(tmp_path))) == 0
    assert_same(outcome(tmp_path), whole)


@pytest.mark.processes
@pytest.mark.parametrize("killed", [0, 1], ids=["the one that writes", "the other"])
def test_two_processes_of_which_one_is_killed(made, tmp_path, killed):
    """The other ends too, and both go on to the bits of two processes that nobody disturbed."""
    undisturbed, runs = tmp_path / "undisturbed", tmp_path / "killed"
    assert together(made, undisturbed, 2) == [0, 0]
    codes = together(made, runs, 2, killed, (r"/checkpoints/\.", 3) if killed == 0 else 5)
    assert codes[killed] == -9 and codes[1 - killed] != 0
    assert together(made, runs, 2) == [0, 0]
    assert_same(outcome(runs), outcome(undisturbed))


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_gone_on_with_by_another_number_of_processes(made, whole, tmp_path, before, after):
    """It ends, every step is taken once, and the numbers are those of one process up to the order of sums."""
    at = (r"/checkpoints/\.", 6)
    codes = together(made, tmp_path, before, 0, at)
    assert codes[0] == -9
    assert together(made, tmp_path, after) == [0] * after
    found = outcome(tmp_path)
    steps = [step[:2] for step in found["losses"]]
    assert len(steps) == len(set(steps)) and steps == [step[:2] for step in whole["losses"]]
    assert found["chosen"] == whole["chosen"]
    assert found["judged"]["student"] == pytest.approx(whole["judged"]["student"], rel=0.05)
