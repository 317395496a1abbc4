"""The verbs of the command line: each parses its arguments, calls the API once and prints the result."""

import sys
from collections.abc import Callable
from io import TextIOBase
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import distill
from distill import processes
from distill.cli.answers_verb import answers, questions
from distill.cli.arguments import Gpus, Json, Overrides, RecipeArgument, names_of
from distill.cli.output import check_json, quiet_libraries, say, table_console, write_json
from distill.exporters import EXPORTERS, help_lines
from distill.ranges import CHUNK, GPU_GIB, KEPT, MINUTES, NEW_TOKENS, PREPARING, PROCESSES, SHOWN, TEMPERATURE, TOP_K
from distill.selection import SCORERS

RunsOption = Annotated[Path, typer.Option(help="The folder in which run folders are made.")]


def add_to(app: typer.Typer) -> None:
    """Put every verb on the command line, in the order of `--help`."""
    first: tuple[Callable[..., None], ...] = (plan, prepare, questions, answers, run, cache, select)
    last: tuple[Callable[..., None], ...] = (report, export, generate, doctor)
    for verb in first:
        app.command()(verb)
    app.command("eval")(evaluate)
    for verb in last:
        app.command()(verb)


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also load teacher and text, and try what a run tries before it trains.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="GPUs that share the batches.", callback=PROCESSES.option("--gpus"))] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of a GPU in GiB.", callback=GPU_GIB.option("--gpu-memory"))] = 80,
    json: Json = None,
) -> None:
    """Print what a run would do: layers, parameters, memory, tokens, time, exports. Trains nothing."""
    from distill.plan_table import show
    from distill.recipe_file import load
    from distill.shipped import find

    quiet_libraries()
    loaded = load(recipe, overrides or [])
    worked_out = distill.plan(loaded, check=check, gpus=gpus, gpu_memory=gpu_memory)
    show(worked_out, loaded, find(recipe), table_console(json))
    write_json(json, worked_out.numbers())


def prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Processes that tokenise; chosen by the cores by default.", callback=PREPARING.option("--processes")
        ),
    ] = None,
    show: Annotated[
        int,
        typer.Option(
            help="Documents of each text to print, with the trained tokens marked.", callback=SHOWN.option("--show")
        ),
    ] = 0,
    json: Json = None,
) -> None:
    """Tokenise a recipe's texts before a run. A call that was stopped continues where it was."""
    from distill.recipe_file import load
    from distill.runs.preparing import print_prepared

    quiet_libraries()
    check_json(json)
    loaded = load(recipe, overrides or [])
    made = distill.prepare(loaded, processes=processes, show=show)
    print_prepared(made, loaded, table_console(json))
    write_json(json, made)


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run of the recipe left.")] = False,
    runs: RunsOption = Path("runs"),
    stop_after: Annotated[
        float | None,
        typer.Option(help="Minutes after which to save and stop.", callback=MINUTES.option("--stop-after")),
    ] = None,
    gpus: Gpus = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Run N processes on a CPU.", metavar="N", callback=PROCESSES.option("--processes")),
    ] = None,
) -> None:
    """Run a recipe, or continue an earlier run of it from where it stopped."""
    quiet_libraries()
    several: dict[str, Any] = {"gpus": gpus, "processes": processes}
    distill.run(recipe, overrides=overrides or [], fresh=fresh, runs=runs, stop_after=stop_after, **several)


def cache(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder; by default the stage's offline_logits, else one in the cache.", metavar="FOLDER"),
    ] = None,
    top_k: Annotated[
        int, typer.Option(help="Most likely tokens kept of each distribution.", callback=TOP_K.option("--top-k"))
    ] = 128,
    stage: Annotated[
        str | None, typer.Option(help="The stage's number, if several stages can be cached.", metavar="NUMBER")
    ] = None,
    stop_after: Annotated[
        float | None, typer.Option(help="Minutes after which to stop.", callback=MINUTES.option("--stop-after"))
    ] = None,
) -> None:
    """Cache the teacher's top-k logits, for training without the teacher, or continue where an earlier call stopped."""
    quiet_libraries()
    say(distill.cache(recipe, overrides=overrides or [], out=out, top_k=top_k, stage=stage, stop_after=stop_after))


def select(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    by: Annotated[
        str | None,
        typer.Option(help=f"The scorer, recall by default: {', '.join(SCORERS)}.", autocompletion=names_of(SCORERS)),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Layers (or heads) that keep attention: a number or a share.", callback=KEPT.option("--keep")),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="The folder of task files for --by task.", metavar="FOLDER")] = None,
    write: Annotated[Path | None, typer.Option(help="A file for the recipe with the chosen layout.", metavar="FILE")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    runs: RunsOption = Path("runs"),
    json: Json = None,
) -> None:
    """Choose the layers or heads that keep attention, by a scorer on the teacher."""
    from distill.selection.tables import show

    quiet_libraries()
    check_json(json)
    count = int(keep) if keep is not None and keep.is_integer() else keep
    asked: dict[str, Any] = {"by": by, "keep": count, "tasks": tasks, "runs": runs, "fresh": fresh, "write": write}
    chosen = distill.select(recipe, overrides=overrides or [], **asked)
    show(chosen, table_console(json))
    if write is not None and str(json) != "-":
        say(f"written: {write}")
    write_json(json, chosen)


def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder, or a student's folder or hub id.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher, if the target does not name it.")] = None,
    heldout: Annotated[str | None, typer.Option(help="Files of held-out text (a glob).")] = None,
    suite: Annotated[str, typer.Option(help="The evaluations: quick, standard or full.")] = "quick",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="A folder of task files, or harness for lm-evaluation-harness; DISTILL_TASKS by default.", metavar="FOLDER"
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Evaluate a student against its teacher and the untrained baselines."""
    from distill.console import new_console
    from distill.evaluation.table import show

    quiet_libraries()
    check_json(json)
    said = new_console(stderr=True, quiet=bool(processes.rank()))
    judged = distill.evaluate(target, teacher=teacher, heldout=heldout, suite=suite, tasks=tasks, console=said)
    if processes.rank():  # only the first of several processes prints
        return
    show(judged, table_console(json))
    write_json(json, judged)


def report(
    runs: Annotated[list[Path], typer.Argument(help="One run folder to write its report again, or several to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file; by default report.html in the run folder, or comparison.html here for several."),
    ] = None,
) -> None:
    """Write a run's report again, or one page that compares several runs."""
    quiet_libraries()
    say(distill.report(*runs, out=out))


def export(
    run: Annotated[Path, typer.Argument(help="The run folder, or a finished student's folder.")],
    to: Annotated[
        str | None,
        typer.Option(
            help=f"The target; by default native if it can hold the student, else portable. {help_lines()}.",
            autocompletion=names_of(EXPORTERS),
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; RUN/export/TARGET by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The type of the weights: bfloat16 (the default) or float32.")] = None,
    quantize: Annotated[str | None, typer.Option(help="A quantised type of the target, such as q8_0.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check the export in every installed engine that should run it.")
    ] = True,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="The Python of an engine in its own environment; also DISTILL_ENGINES.", metavar="NAME=PYTHON"
        ),
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to this repository of the hub.", metavar="OWNER/NAME")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make that repository public.")] = False,
) -> None:
    """Write a run's student in a form that other software loads, and check it there."""
    from distill.console import new_console
    from distill.exporters.engines import parsed

    quiet_libraries()
    options: dict = {
        "to": to,
        "out": out,
        "dtype": dtype,
        "quantize": quantize,
        "verify": verify,
        "push": push,
        "public": public,
    }
    say(distill.export(run, engines=parsed(engines or []), console=new_console(stderr=True), **options))


def generate(
    target: Annotated[Path, typer.Argument(help="A run folder, or a student's folder.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads the standard input.")],
    tokens: Annotated[int, typer.Option(help="The most new tokens.", callback=NEW_TOKENS.option("--tokens"))] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")] = False,
    temperature: Annotated[
        float,
        typer.Option(
            help="0 takes the most likely token, a positive number samples.", callback=TEMPERATURE.option("--temperature")
        ),
    ] = 0.0,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="On a GPU, decode each token as one CUDA graph.")
    ] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the folder's own code if no installed code can load it.")
    ] = False,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompt at a time; chosen by the free memory by default.",
            callback=CHUNK.option("--prefill-chunk"),
        ),
    ] = None,
) -> None:
    """Generate text with a student, from a prompt."""
    quiet_libraries()
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")  # bytes that are not UTF-8 are refused later
    how: dict = {
        "tokens": tokens,
        "chat": chat,
        "temperature": temperature,
        "graphs": graphs,
        "prefill_chunk": prefill_chunk,
    }
    how["trust_remote_code"] = trust_remote_code
    distill.generate(target, prompt, stream=cast(TextIOBase, sys.stdout), **how)


def doctor(json: Json = None) -> None:
    """Print what this machine has: versions, devices, kernel back ends, and missing packages."""
    from distill.diagnosis import table

    found = distill.doctor()
    table_console(json).print(table(found))
    write_json(json, found)
