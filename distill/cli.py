"""The command line. Every verb is one call; nothing heavy is imported until a verb needs it."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from distill import __version__
from distill.cli_arguments import Json, Overrides, RecipeArgument, ShippedArgument
from distill.errors import UserError, explains_itself

app = typer.Typer(
    name="distill",
    help="Turn pretrained Transformers into state-space hybrids by distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
ALONE = Path("-")  # for --json
recipes_app = typer.Typer(help="List, show and copy the recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


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
def plan(recipe: RecipeArgument, overrides: Overrides = None, json: Json = None) -> None:
    """Say what a run would do: layers, parameters, memory, tokens, time, exports. Runs nothing."""
    from distill.plan import show

    _quiet_libraries()
    _write_json(json, show(recipe, overrides or [], _console(json)).numbers())


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


@app.command()
def select(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    by: Annotated[str | None, typer.Option(help="The scorer, recall by default.")] = None,
    keep: Annotated[float | None, typer.Option(help="Layers (or heads) that stay attention: a number or a share.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task files, for --by task.", metavar="FOLDER")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the recipe with the chosen layout.", metavar="FILE")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    runs: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    json: Json = None,
) -> None:
    """Choose the layers or heads that stay attention, by what the teacher loses without them."""
    import distill
    from distill.select.show import show
    from distill.trainer import Interrupted

    _quiet_libraries()
    _check_writable(json)
    count = int(keep) if keep is not None and keep.is_integer() else keep
    try:
        chosen = distill.select(
            recipe, overrides=overrides or [], by=by, keep=count, tasks=tasks, runs=runs, fresh=fresh, write=write
        )
    except Interrupted as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        raise typer.Exit(3) from None
    show(chosen, _console(json))
    _write_json(json, chosen)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder, or a student's folder or hub id.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher, where the target does not say.")] = None,
    heldout: Annotated[str | None, typer.Option(help="Files of text to judge on (a glob).")] = None,
    suite: Annotated[str, typer.Option(help="How much: quick, standard or full.")] = "quick",
    tasks: Annotated[
        str | None, typer.Option(help="A folder of task files, or harness; DISTILL_TASKS by default.", metavar="FOLDER")
    ] = None,
    json: Json = None,
) -> None:
    """Judge a student against its teacher and the untrained baselines."""
    import distill
    from distill.console import new_console
    from distill.evaluate.table import show

    _quiet_libraries()
    _check_writable(json)
    said = new_console(stderr=True)
    judged = distill.evaluate(target, teacher=teacher, heldout=heldout, suite=suite, tasks=tasks, console=said)
    show(judged, _console(json))
    _write_json(json, judged)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: one to write its report again, several to compare them.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; report.html in the run folder, or comparison.html here, by default."),
    ] = None,
) -> None:
    """Write a run's report again, or one page that compares several runs."""
    import distill

    _quiet_libraries()
    print(distill.report(*runs, out=out))


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
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="On a GPU, a token is one CUDA graph.")] = True,
) -> None:
    """Let a student go on with a text."""
    from distill.generate import generate as generate_text

    _quiet_libraries()
    generate_text(run_folder, prompt, tokens=tokens, chat=chat, temperature=temperature, graphs=graphs)


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help='Ops to time, all by default; "steps": training steps of a recipe; "layouts": train every layout (or those '
            "named) on a recipe's budget.",
            metavar="[OP]... | steps | layouts [NAME]...",
        ),
    ] = None,
    json: Json = None,
    recipe: Annotated[str | None, typer.Option(help="Whose steps, or whose layers, text and budget.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe's.")] = None,
    configs: Annotated[bool, typer.Option("--configs", help="Time every shipped tile configuration.")] = False,
    first: Annotated[bool, typer.Option("--first", help="Only each op's first case.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Other people's kernels too, where installed.")] = True,
    runs: Annotated[Path, typer.Option(help="Where the runs of layouts are kept.")] = Path("runs"),
    references: Annotated[bool, typer.Option("--references/--no-references", help="Steps on the references too.")] = True,
) -> None:
    """Time the kernels on this GPU, beside their references and the peers that are installed, or whole training steps."""
    _check_writable(json)
    if what == ["steps"]:
        from distill.bench import steps as measured

        result = measured.run(recipe or "smollm2-135m_mamba2-hybrid", sets or [], references)
    elif what and what[0] == "layouts":
        from distill.bench import layouts as measured

        result = measured.run(recipe or "quickstart", sets or [], what[1:], runs / "layouts")
    else:
        from distill import bench as measured

        result = measured.run(what or [], configs=configs, first_only=first, peers=peers)
    _console(json).print(measured.table(result))
    _write_json(json, result)
    if not measured.all_right(result):
        raise typer.Exit(1)


@app.command()
def doctor(json: Json = None) -> None:
    """Say what is here: versions, devices, kernel back ends, and what is missing."""
    from distill.doctor import show

    _write_json(json, show(_console(json)))


@recipes_app.command("ls")
def recipes_ls(json: Json = None) -> None:
    """List the shipped recipes."""
    from distill.shipped import list_recipes

    _write_json(json, list_recipes(_console(json)))


@recipes_app.command("show")
def recipes_show(name: ShippedArgument) -> None:
    """Print a shipped recipe."""
    from distill.recipe import find

    print(find(name).read_text(), end="")


@recipes_app.command("cp")
def recipes_cp(
    name: ShippedArgument,
    target: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path("."),
) -> None:
    """Copy a shipped recipe, to change it."""
    from distill.shipped import copy_recipe

    print(copy_recipe(name, target))


def entry() -> None:
    """The program: user errors end in one message and exit code 2, without a traceback unless asked for."""
    debug = "--debug" in sys.argv
    try:
        app(prog_name="distill")  # also where it is called by python -m
    except (UserError, ValueError) as error:
        if debug or not explains_itself(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _quiet_libraries() -> None:
    """Our own progress is enough; downloads and preparations show theirs on a terminal, and draw no bars into a file."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read when `datasets` is imported, which may never be needed
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _console(json: Path | None):
    """Where a verb's table goes: nowhere, where JSON alone is to be printed."""
    from distill.console import new_console

    return new_console(quiet=json == ALONE)


def _check_writable(path: Path | None) -> None:
    """Refuse a file that cannot be written before the work whose result it would hold."""
    if path is not None and path != ALONE:
        from distill.disk import check_writable

        check_writable(path, "--json")


def _write_json(path: Path | None, content: dict | list) -> None:
    import json

    text = json.dumps(content, indent=1)
    if path == ALONE:
        print(text)
    elif path is not None:
        from distill.run_dir import write_text

        write_text(path, text)


if __name__ == "__main__":
    entry()
