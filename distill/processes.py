"""The processes of one run: their number and this process's rank, from the launcher's environment variables."""

import atexit
import os
import signal
import sys
import threading
import time

from distill.errors import UserError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # read by accelerate, in its order
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # every `accelerate launch` sets it
SEVERAL = "MASTER_ADDR"  # `accelerate launch` sets it only for several processes
LAUNCHED = "DISTILL_LAUNCHED"  # set by our own launcher
LEAVING = 60.0  # seconds that a process has to save and exit after its launcher has died


def count() -> int:
    """The number of processes that share the run; 1 without a launcher."""
    return max(1, _first(SIZES, 1))


def rank() -> int:
    """The rank of this process, from 0."""
    return max(0, _first(RANKS, 0))


def check_launch() -> None:
    """Refuse to run alone if `accelerate launch` was asked for several processes; without GPUs it starts one silently.

    Raises:
        UserError: naming a command that starts several.
    """
    if BY_ACCELERATE in os.environ and SEVERAL in os.environ and not any(name in os.environ for name in SIZES):
        raise UserError(
            "accelerate launch was asked for several processes and started one, because it found no GPU for each; "
            "on a CPU start two with: torchrun --nproc-per-node 2 -m distill.cli run RECIPE (and device=cpu if there is "
            f"a GPU); to run one process, leave out --num_processes and unset {SEVERAL}"
        )


def leave_at_exit() -> None:
    """Leave the process group when this process exits, unless an exception ends it.

    Threads of gloo may hold tensors when a collective returns. A process that exits before they let go is aborted with
    "terminate called without an active exception" (https://github.com/pytorch/pytorch/pull/179291).
    """
    stay_at_exit()
    atexit.register(_leave)


def stay_at_exit() -> None:
    """Do not leave the process group at exit. For a process that failed: leaving could wait for the others for ever."""
    atexit.unregister(_leave)


def _leave() -> None:
    import torch.distributed as dist

    if not hasattr(sys, "last_value") and dist.is_initialized():  # Python sets it for an exception that nothing caught
        dist.destroy_process_group()


def launched() -> bool:
    """Whether our own launcher started this process."""
    return LAUNCHED in os.environ


def follow_launcher() -> None:
    """Terminate this process when its launcher dies, which closes the standard input."""
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    os._exit(1)


def _first(names: tuple[str, ...], usual: int) -> int:
    """The value of the first of these environment variables that holds a whole number; `usual` if none does."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isascii() and value.isdigit()), usual)
