"""The command line. Every verb is one call of the Python API; heavy modules are imported only when a verb needs them."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from distill import processes
from distill.cli import bench_verbs, recipe_verbs, verbs
from distill.errors import Ended, Interrupted, UserError, explains_itself, printable, reason_of, shortened
from distill.version import __version__

PATIENCE = 30.0  # seconds that all processes but the first wait before they print their error
TALKATIVE = ("torchao", "torch.utils._pytree")  # loggers that warn when transformers imports an installed torchao
SHORT_PATIENCE = 8.0  # seconds that a process waits for its launcher to end it, before it prints a traceback

app = typer.Typer(
    name="distill",
    help="Turn pretrained Transformers into state-space hybrids by distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
verbs.add_to(app)
app.add_typer(bench_verbs.app, name="bench")
app.add_typer(recipe_verbs.app, name="recipes")
app.command("schema")(recipe_verbs.schema)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print more log messages.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Shown("%(name)s: %(message)s"))
    if version:
        print(__version__)
        raise typer.Exit


class _Shown(logging.Formatter):
    """A log formatter that escapes control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Inside the block, delay the errors of all processes but the first, so that usually only the first one prints.

    The other processes mostly fail for the same reason, or because the first has failed, and their launcher then ends them.
    With our own launcher, the output of the others goes to the launcher alone. A process then waits only if its error has no
    message of its own, such as a lost connection, so that the launcher can end it first.
    """
    try:
        yield
    except Exception as error:
        if processes.launched():
            if not isinstance(error, Interrupted) and not explains_itself(error):
                time.sleep(SHORT_PATIENCE)
        elif processes.rank():
            time.sleep(PATIENCE)
        raise


@contextmanager
def _staying_if_it_fails() -> Iterator[None]:
    """Inside the block, an error keeps this process in the process group. All processes are interrupted together."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Interrupted) and not (isinstance(error, SystemExit) and not error.code):
            processes.stay_at_exit()
        raise


def entry() -> None:
    """Run the program. A user error ends in one message and exit code 2, with a traceback only under --debug."""
    debug = "--debug" in sys.argv
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if processes.launched():
        processes.follow_launcher()
    try:
        with _staying_if_it_fails(), _first_speaks():
            app(prog_name="distill")  # the name also under python -m
    except Interrupted as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        sys.exit(3)
    except Ended as end:
        sys.exit(end.code)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"error: {shortened(printable(error.filename))} cannot be used: {reason_of(error)}", file=sys.stderr)
        sys.exit(2)
    except (UserError, ValueError) as error:
        if debug or not explains_itself(error):
            raise
        print(f"error: {shortened(printable(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:
        if debug or type(error).__name__ != "PanicException":  # from tokenizers' Rust code; not an Exception
            raise
        print(f"error: the tokenizer failed on a text: {error}; restore its tokenizer.json", file=sys.stderr)
        sys.exit(2)
