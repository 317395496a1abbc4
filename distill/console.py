"""Where text for people goes: a terminal with its colours, or plain lines wide enough for tables anywhere else."""

import os

from rich.console import Console

PLAIN_WIDTH = 140  # characters of a line where there is no terminal to ask


def new_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on the standard output or error; `quiet` prints nothing."""
    console = Console(stderr=stderr, quiet=quiet)
    plain = not console.is_terminal and "COLUMNS" not in os.environ
    return Console(stderr=stderr, quiet=quiet, width=PLAIN_WIDTH) if plain else console
