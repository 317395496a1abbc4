"""The command line. Every verb is one call of the Python API; nothing heavy is imported until a verb needs it."""

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

PATIENCE = 30.0  # seconds that other processes than the first wait before they say what ended them
TALKATIVE = ("torchao", "torch.utils._pytree")  # when torchao is imported, as transformers does wherever it is installed
SHORT_PATIENCE = 8.0  # that a process waits for its launcher to end it, before it shows a traceback

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
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more about what happens.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where something fails.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Shown("%(name)s: %(message)s"))
    if version:
        print(__version__)
        raise typer.Exit


class _Shown(logging.Formatter):
    """Log lines of which a terminal shows everything and acts on nothing."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Of several processes the first says at once what ends it; the others wait, as what ends them is mostly the same, or
    that the first is gone, and whoever started them ends them when that one is. Of those that our own launcher started the
    others write to it alone, and the first waits where it only knows that another one is gone."""
    try:
        yield
    except Exception as error:
        if processes.launched():
            if not isinstance(error, Interrupted) and not explains_itself(error):
                time.sleep(SHORT_PATIENCE)
        elif processes.rank():
            time.sleep(PATIENCE)
        raise


def entry() -> None:
    """The program: user errors end in one message and exit code 2, without a traceback unless asked for."""
    debug = "--debug" in sys.argv
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if processes.launched():
        processes.follow_launcher()
    try:
        with _first_speaks():
            app(prog_name="distill")  # also where it is called by python -m
    except Interrupted as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        sys.exit(3)
    except Ended as end:
        sys.exit(end.code)
    except BrokenPipeError:  # whoever read the output has read enough
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
        if debug or type(error).__name__ != "PanicException":  # of tokenizers' code in Rust, which is no Exception
            raise
        print(f"error: the tokenizer broke off on a text: {error}; bring back its tokenizer.json", file=sys.stderr)
        sys.exit(2)
