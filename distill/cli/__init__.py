"""The command line. Every verb is one call of the Python API; nothing heavy is imported until a verb needs it."""

import logging
import sys
from typing import Annotated

import typer

from distill.cli import bench_verbs, recipe_verbs, verbs
from distill.errors import Interrupted, UserError, explains_itself
from distill.version import __version__

app = typer.Typer(
    name="distill",
    help="Turn pretrained Transformers into state-space hybrids by distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
verbs.add_to(app)
app.add_typer(bench_verbs.app, name="bench")
app.add_typer(recipe_verbs.app, name="recipes")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more about what happens.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where something fails.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if version:
        print(__version__)
        raise typer.Exit


def entry() -> None:
    """The program: user errors end in one message and exit code 2, without a traceback unless asked for."""
    debug = "--debug" in sys.argv
    try:
        app(prog_name="distill")  # also where it is called by python -m
    except Interrupted as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        sys.exit(3)
    except (UserError, ValueError) as error:
        if debug or not explains_itself(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:
        if debug or type(error).__name__ != "PanicException":  # of tokenizers' code in Rust, which is no Exception
            raise
        print(f"error: the tokenizer broke off on a text: {error}; bring back its tokenizer.json", file=sys.stderr)
        sys.exit(2)
