"""The processes of one run, as whoever started them says in the environment: how many, and which one this is."""

import os
import signal
import threading
import time

from distill.errors import UserError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # that accelerate reads, in its order
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # every `accelerate launch` sets it
SEVERAL = "MASTER_ADDR"  # and this one only for several processes
LAUNCHED = "DISTILL_LAUNCHED"  # set by our own launcher
LEAVING = 60.0  # seconds that a process whose launcher is gone has to save and leave


def count() -> int:
    """How many processes share the run; 1 where nothing started several."""
    return max(1, _first(SIZES, 1))


def rank() -> int:
    """Which of them this is, from 0."""
    return max(0, _first(RANKS, 0))


def check_launch() -> None:
    """Refuse to go on alone where `accelerate launch` was asked for several processes: without GPUs it starts one and says
    nothing.

    Raises:
        UserError: with a command that starts several.
    """
    if BY_ACCELERATE in os.environ and SEVERAL in os.environ and not any(name in os.environ for name in SIZES):
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does where it finds no GPU for each; "
            "on a CPU start two with: torchrun --nproc-per-node 2 -m distill.cli run RECIPE (with device=cpu where there is "
            f"a GPU); where one is meant, leave out --num_processes and unset {SEVERAL}"
        )


def launched() -> bool:
    """Whether our own launcher started this process."""
    return LAUNCHED in os.environ


def follow_launcher() -> None:
    """Let this process be asked to terminate when its launcher has died, which the end of the standard input tells."""
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    os._exit(1)


def _first(names: tuple[str, ...], usual: int) -> int:
    """The first of these variables that holds a whole number."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isascii() and value.isdigit()), usual)
