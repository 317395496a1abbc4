"""The command line. Every verb is one call; nothing heavy is imported until a verb needs it."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from distill import __version__
from distill.errors import UserError

app = typer.Typer(
    name="distill",
    help="Turn pretrained Transformers into state-space hybrids by distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List, show and copy the recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, key.sub=value.", metavar="[KEY=VALUE]...")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]


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


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Say what a run would do: layers, parameters, memory, tokens, time, exports. Runs nothing."""
    from distill.plan import show

    show(recipe, overrides or [])


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run of it left.")] = False,
    runs: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    stop_after: Annotated[float | None, typer.Option(help="Save and stop after so many minutes.")] = None,
) -> None:
    """Run a recipe, or go on where an earlier run of it stopped."""
    from distill.recipe import load
    from distill.runner import run as run_recipe
    from distill.trainer import Interrupted

    _quiet_libraries()
    try:
        run_recipe(load(recipe, overrides or []), runs=runs, fresh=fresh, stop_after=stop_after)
    except Interrupted as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        raise typer.Exit(3) from None


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder, or a student's folder or hub id.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher, where the target does not say.")] = None,
    heldout: Annotated[str | None, typer.Option(help="Files of text to judge on (a glob).")] = None,
    json: Json = None,
) -> None:
    """Judge a student against its teacher and the untrained baselines."""
    import distill
    from distill.report import headline

    _quiet_libraries()
    judged = distill.evaluate(target, teacher=teacher, heldout=heldout)
    _print(headline(judged))
    _write_json(json, judged)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="The run folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="The form: portable.")] = "portable",
) -> None:
    """Write a run's student in a form that other software loads."""
    import distill

    _quiet_libraries()
    print(distill.export(run_folder, to=to, out=out))


@app.command()
def generate(
    run_folder: Annotated[Path, typer.Argument(help="A run folder, or a student's folder.")],
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, more samples.")] = 0.0,
) -> None:
    """Let a student go on with a text."""
    from distill.generate import generate as generate_text

    _quiet_libraries()
    generate_text(run_folder, prompt, tokens=tokens, chat=chat, temperature=temperature)


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to time; all of them by default.", metavar="[OP]...")] = None,
    json: Json = None,
    configs: Annotated[bool, typer.Option("--configs", help="Time every shipped tile configuration.")] = False,
    first: Annotated[bool, typer.Option("--first", help="Only each op's first case.")] = False,
) -> None:
    """Time the kernels on this GPU, beside their references and the peers that are installed."""
    from distill.bench import all_right, table
    from distill.bench import run as run_bench

    result = run_bench(ops or [], configs=configs, first_only=first)
    _print(table(result))
    _write_json(json, result)
    if not all_right(result):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what is here: versions, devices, kernel back ends, and what is missing."""
    from distill.doctor import show

    show()


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from distill.shipped import list_recipes

    list_recipes()


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="A shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    from distill.recipe import find

    print(find(name).read_text(), end="")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    target: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path("."),
) -> None:
    """Copy a shipped recipe, to change it."""
    from distill.shipped import copy_recipe

    print(copy_recipe(name, target))


def entry() -> None:
    """The program: user errors end in one message and exit code 2, without a traceback unless asked for."""
    debug = "--debug" in sys.argv
    try:
        app()
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _quiet_libraries() -> None:
    """Our own progress is enough."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _print(renderable) -> None:
    from rich.console import Console

    Console().print(renderable)


def _write_json(path: Path | None, content: dict) -> None:
    if path is not None:
        import json

        from distill.run_dir import write_text

        write_text(path, json.dumps(content, indent=1))


if __name__ == "__main__":
    entry()
