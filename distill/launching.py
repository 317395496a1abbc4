"""The launcher of several processes of one run on this machine: it starts them, stops them together, and reports failures.

Each process is `python -m distill.cli run` with the environment variables that torchrun would set. They connect to a
TCPStore on 127.0.0.1 that this process holds, on a port that the system chooses. The first process prints. The output of
another process is shown only if that process ended the run.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from distill import processes
from distill.disk import write_text
from distill.errors import Ended, UserError
from distill.ranges import PROCESSES
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.runs.together import check_backends
from distill.training.checks import check_here

POLL = 0.05  # seconds between two looks at the processes
GRACE = 4.0  # seconds that the first process has to print the reason, after another one has failed
LAST = 60.0  # seconds that the others have to exit after the first one has succeeded
SAID = (2, 3, 130)  # exit codes of processes that printed one message with the reason
CALM = "so the others were stopped; the same command goes on from the last checkpoint"


def count_of(gpus: int | None, count: int | None, recipe: Recipe) -> int:
    """The number of processes that the options ask for; 1 without them.

    Raises:
        UserError: the machine has too few GPUs, both options are given, a number is out of range, another launcher already
            started several processes, or no communication back end is available.
    """
    if gpus is None and count is None:
        return 1
    option, number = ("--gpus", gpus) if gpus is not None else ("--processes", cast(int, count))
    if gpus is not None and count is not None:
        raise UserError(f"--gpus {gpus} and --processes {count}: a run has one process for each GPU; give only one")
    PROCESSES.check(number, option)
    if processes.count() > 1:
        raise UserError(
            f"{option} is {number}, but this is already one of {processes.count()} processes that a launcher started "
            "(WORLD_SIZE in the environment); leave out the option or the launcher"
        )
    if option == "--gpus":
        _check_gpus(number, recipe)
    elif number > 1:
        _check_cpu(number, recipe)
    if number > 1:
        check_backends(gpu=option == "--gpus")
    return number


def _check_gpus(gpus: int, recipe: Recipe) -> None:
    import torch

    if recipe.device == "cpu":
        raise UserError(f"--gpus is {gpus}, but device is 'cpu'; set device=auto, or use --processes {gpus}")
    if (here := torch.cuda.device_count()) < gpus:
        raise UserError(
            f"--gpus is {gpus}, but PyTorch sees {here} here; ask for {here} or fewer (CUDA_VISIBLE_DEVICES may hide some)"
            if here
            else f"--gpus is {gpus}, but PyTorch sees no GPU here; use --processes {gpus}, or see `distill doctor`"
        )


def _check_cpu(number: int, recipe: Recipe) -> None:
    import torch

    if recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available()):
        raise UserError(
            f"--processes is {number}, which is for CPUs, but device is {recipe.device!r} and would be a GPU; set "
            "device=cpu, or use --gpus"
        )


def launch(
    reference: object,
    overrides: str | Sequence[str],
    recipe: Recipe,
    world: int,
    *,
    runs: Path,
    fresh: bool,
    stop_after: float | None,
) -> RunDir:
    """Run a recipe in `world` processes; returns the run folder.

    Args:
        reference, overrides: the recipe as the caller gave it. recipe: the loaded recipe.

    Raises:
        UserError: a check before the start failed. Ended: a process failed; the reason has been printed.
    """
    check_here(recipe, world=world)
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    with ExitStack() as stack:
        if not isinstance(reference, str | os.PathLike):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="distill-")))
            reference, overrides = folder / f"{recipe.name}.yaml", []
            write_text(reference, recipe.yaml())
        command = [sys.executable, "-m", "distill.cli", "run", os.fspath(reference), *overrides, "--runs", os.fspath(runs)]
        command += ["--fresh"] if fresh else []
        command += [] if stop_after is None else ["--stop-after", str(stop_after)]
        group = Group.started(command, world, stack)
        with group.signals():
            code, said = group.supervise()
    if code:
        if said:
            print(said, file=sys.stderr)
        raise Ended(code)
    return RunDir.existing(RunDir.path_of(recipe, runs))


@dataclass
class Group:
    """The processes by rank, and the output files of all but the first."""

    members: list[subprocess.Popen]
    said: list[BinaryIO | None]

    @classmethod
    def started(cls, command: Sequence[str], world: int, stack: ExitStack) -> "Group":
        """Start the processes; closing the stack kills those that are left."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stack.callback(lambda: store)  # keeps the store until the stack is closed
        group = cls([], [])
        stack.callback(group.kill)
        for rank in range(world):
            log = stack.enter_context(tempfile.TemporaryFile()) if rank else None  # noqa: SIM115
            group.said.append(log)
            group.members.append(
                subprocess.Popen(
                    command,
                    env=environment(rank, world, store.port),
                    stdin=subprocess.PIPE,  # it closes when this process dies, see `processes.follow_launcher`
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C on a terminal reaches only this process, which forwards it once
                )
            )
        return group

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside the block, SIGINT and SIGTERM are forwarded to every process."""

        def hand_on(number: int, frame: object) -> None:
            for member in self.members:
                if member.poll() is None:
                    member.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def supervise(self) -> tuple[int, str]:
        """Wait until all have ended or one has failed. Returns the exit code, and text to print in addition to the first
        process's own output."""
        ended_well = None
        while True:
            codes = [member.poll() for member in self.members]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                return self._ended(failed, codes)
            if all(code == 0 for code in codes):
                return 0, ""
            if codes[0] == 0:
                ended_well = ended_well or time.monotonic()
                if time.monotonic() - ended_well > LAST:
                    return 0, ""
            time.sleep(POLL)

    def _ended(self, failed: list[int], codes: list[int | None]) -> tuple[int, str]:
        """A process has failed: give the first one time to print the reason, and stop the others."""
        ended = {rank: cast(int, codes[rank]) for rank in failed}
        culprit = min(failed, key=lambda rank: (ended[rank] >= 0, ended[rank] not in SAID, rank))
        code, world = ended[culprit], len(codes)
        if code > 0 and culprit:
            first = self._wait(0, GRACE)
            if first is not None and first in SAID:
                culprit, code = 0, first
        elif code in SAID:  # the others save and exit too
            for rank in range(1, world):
                self._wait(rank, GRACE / world)
        self.kill()
        if code < 0:
            name = signal.Signals(-code).name
            if -code in (signal.SIGTERM, signal.SIGINT):
                return 128 - code, ""
            return 1, f"error: process {culprit} of {world} was killed by {name} (out of memory, or by hand), {CALM}"
        said = self._told_by(culprit) if culprit else ""
        if code in SAID:
            start = max(said.rfind("\nerror: "), said.rfind("\nstopped: ")) + 1
            return code, said[start:].strip()
        return code, f"{said}\nerror: process {culprit} of {world} ended with exit code {code}, {CALM}".strip()

    def _told_by(self, rank: int) -> str:
        log = cast(BinaryIO, self.said[rank])
        log.seek(0)
        return "\n" + log.read().decode(errors="replace").strip()

    def _wait(self, rank: int, seconds: float) -> int | None:
        try:
            return self.members[rank].wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill the processes that still run; checkpoints are written whole or not at all, so none is damaged."""
        for member in self.members:
            if member.poll() is None:
                member.kill()
        for member in self.members:
            member.wait()
            cast(IO[bytes], member.stdin).close()


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment variables of a process."""
    threads = str(max(1, (os.cpu_count() or 1) // world))
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        processes.LAUNCHED: 1,
    }
    others = {"OMP_NUM_THREADS": threads} | os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    return others | {name: str(value) for name, value in own.items()}
