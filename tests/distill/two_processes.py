"""Commands in several processes, and a run that stops at its third step."""

import os
import subprocess
import sys


def launcher(processes):
    """The words behind `python` that start so many processes on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]


TWO = launcher(2)
# A run that stops when its third step is taken.
STOPPED = """
import sys
import distill
from distill.errors import Interrupted
from distill.runs.stopper import Stopper

asked = iter(range(1000))
Stopper.due = lambda self: "enough" if next(asked) == 2 else None
try:
    distill.run(sys.argv[1], runs=sys.argv[2])
except Interrupted:
    sys.exit(0)
sys.exit("it was not stopped")
"""


def in_two(*command):
    """A Python command in two gloo processes; what it ended with, and all it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, *TWO, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr
