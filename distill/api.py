"""The Python API: one function a verb of the command line, and nothing that only one of the two can do.

Imports stand inside the functions, so that `import distill` and `distill --help` take no time.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from io import TextIOBase
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from distill.planning import Plan
    from distill.recipe_file import AnyRecipe
    from distill.runs.run_dir import RunDir


def plan(
    recipe: "AnyRecipe",
    *,
    overrides: str | Sequence[str] = (),
    check: bool = False,
    gpus: int | None = None,
    gpu_memory: float = 80,
) -> "Plan":
    """Work out what a run would do: layers, parameters, memory, tokens, time, exports. Loads nothing unless asked to check.

    Args:
        recipe: a file, a shipped recipe's name, or a mapping with a recipe's entries. overrides: "key.sub=value", one or
            several. check: load the teacher, and try what a run tries first. gpus, gpu_memory: as in `make_plan`.

    Returns:
        the numbers; `.numbers()` has them as JSON.

    Raises:
        UserError: a recipe that cannot be, a teacher whose config cannot be found, or what the check refuses.
    """
    from distill.planning import planned
    from distill.recipe_file import load

    return planned(load(recipe, overrides), check=check, gpus=gpus, gpu_memory=gpu_memory)


def run(
    recipe: "AnyRecipe",
    *,
    overrides: str | Sequence[str] = (),
    fresh: bool = False,
    runs: str | Path = "runs",
    stop_after: float | None = None,
    gpus: int | None = None,
    processes: int | None = None,
    console: "Console | None" = None,
) -> "RunDir":
    """Run a recipe to its end, or go on where an earlier run of it stopped.

    Args:
        recipe, overrides: as in `plan`. fresh: throw away what an earlier run left. runs: where run folders are made.
            stop_after: minutes after which to save and stop. gpus: run in so many processes with a GPU each. processes: in
            so many on a CPU. console: where progress is shown (the standard error, and always that of several processes).

    Returns:
        the run folder: `.path`, `.read("evaluations.json")`.

    Raises:
        UserError: anything that the user can mend. Interrupted: stopped early, everything saved. Ended: one of several
            processes said on the standard error what ended them.
    """
    from distill.console import new_console
    from distill.launching import count_of, launch
    from distill.recipe_file import load
    from distill.runs.stopper import Stopper, deadline
    from distill.training.finished import finished
    from distill.training.runner import opened, save_student

    given, recipe, stopper = recipe, load(recipe, overrides), Stopper(deadline(stop_after))
    world = count_of(gpus, processes, recipe)
    console = console or new_console(stderr=True)
    if not fresh and (folder := finished(recipe, Path(runs), console)):
        return folder
    if world > 1:
        return launch(given, overrides, recipe, world, runs=Path(runs), fresh=fresh, stop_after=stop_after)
    with opened(recipe, Path(runs), fresh=fresh, stopper=stopper, console=console) as this:
        this.choose_layout()
        while pipeline := this.next_student():
            pipeline.run(this.heldout)
            save_student(pipeline)
        this.conclude()
    return this.folder


def select(
    recipe: "AnyRecipe",
    *,
    overrides: str | Sequence[str] = (),
    by: str | None = None,
    keep: int | float | None = None,
    tasks: str | Path | None = None,
    runs: str | Path = "runs",
    fresh: bool = False,
    write: str | Path | None = None,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Choose which layers or heads of a recipe's teacher stay attention; train nothing but gates.

    Args:
        recipe, overrides: as in `plan`. Where its pattern is written out, as much is kept as there, in other places.
        by, keep, tasks: as in a recipe's `pattern`. runs: where run folders are; measurements are kept in the recipe's own,
            and a call that was stopped goes on from them. fresh: measure everything again. write: a file for the recipe
            with the chosen layout. console: where progress is shown; the standard error by default.

    Returns:
        `chosen` of the folder's selection.json, see `distill.selection.resolution.resolve`, and `folder`.

    Raises:
        UserError: anything that the user can mend. Interrupted: stopped early, everything measured kept.
    """
    from distill.recipe_file import load
    from distill.selection.request import ask_for_selection, check_free, select_layout
    from distill.training.checks import check_fit, check_here

    if write is not None:
        check_free(Path(write))
    change = partial(ask_for_selection, by=by, keep=keep, tasks=None if tasks is None else str(tasks))
    recipe = load(recipe, overrides, change)
    check_here(recipe, trains=False)
    return select_layout(recipe, check_fit, runs=runs, fresh=fresh, write=write, console=console)


def evaluate(
    target: str | PathLike,
    *,
    teacher: str | None = None,
    heldout: str | None = None,
    suite: str = "quick",
    tasks: str | Path | None = None,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Judge a run folder, or a student's folder or hub id, against its teacher and the untrained baselines. What a suite
    finds of a run stays in its folder, and the report is written again with it.

    Args:
        teacher: the teacher's reference, where the target does not say or it moved. heldout: files of text (a glob)
            instead of the run's, or of the shipped held-out text for a checkpoint. suite: quick, standard or full.
        tasks: a folder of task files (see evaluation/task_files.py), or "harness" for lm-evaluation-harness; DISTILL_TASKS
            by default. console: where what is being measured is shown.

    Returns:
        what the docstring of `distill.evaluation` says.

    Raises:
        UserError: the target is no student, the teacher is not its teacher, or there is no such suite or folder.
    """
    from distill import processes
    from distill.console import new_console
    from distill.evaluation.target import judge_target
    from distill.recipe_file import check_run
    from distill.reports import add_judgement

    console = console or new_console(quiet=True)
    check_run(target)
    judged, folder = judge_target(fspath(target), teacher, heldout, suite, tasks, console)
    if folder is not None and not processes.rank():
        add_judgement(folder, judged, console)
    return judged


def report(*runs: str | PathLike, out: str | Path | None = None) -> Path:
    """Write the report of one run again, or compare several on one page; the file's path.

    Args:
        runs: run folders. out: the file to write; for one run report.html in its folder, for several comparison.html here.

    Raises:
        UserError: a folder holds no run or results of another form, no run is named, or the file cannot be written.
    """
    from distill.recipe_file import check_run
    from distill.reports import write_reports

    for folder in runs:
        check_run(folder)
    return write_reports(runs, out)


def export(
    run: str | PathLike,
    *,
    to: str | None = None,
    out: str | PathLike | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    verify: bool = True,
    engines: Mapping[str, str] | None = None,
    push: str | None = None,
    public: bool = False,
    console: "Console | None" = None,
) -> Path:
    """Write the finished student of a run in a form that other software loads, and prove it there before it takes its name.

    Args: as in `distill.exporters.exporting.export_student`. console: where progress is shown.

    Returns:
        the folder written; a UserError says what is damaged, in the way, or not proved.
    """
    from distill.console import new_console
    from distill.exporters.exporting import export_student
    from distill.training.finished import write_down_export

    options: dict = {"to": to, "dtype": dtype, "quantize": quantize, "verify": verify, "push": push, "public": public}
    shown = console or new_console(quiet=True)
    written = export_student(run, out=out, engines=engines, say=lambda line: shown.print(f"  {line}"), **options)
    write_down_export(Path(run), written)
    return written


def generate(
    target: str | PathLike,
    prompt: str,
    *,
    tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    graphs: bool = True,
    trust_remote_code: bool = False,
    prefill_chunk: int | None = None,
    stream: TextIOBase | None = None,
) -> str:
    """Let a student go on with a text.

    Args:
        target: a run folder or a student's folder. tokens: new ones at most. chat: wrap the prompt in the tokenizer's chat
            template. temperature: 0 takes the likeliest token, more samples. graphs: on a GPU, replay each token as one CUDA
            graph. trust_remote_code: run code of the folder, where no installed code can load it; nothing asks.
            prefill_chunk: tokens of the prompt at a time, by memory by default. stream: where the text is also written while
            it comes, `sys.stdout` for one.

    Returns:
        the new text.

    Raises:
        UserError: no whole student; an option, prompt or chat template that cannot be used; logits that are not finite.
    """
    from distill.generation import generated

    options: dict = {"tokens": tokens, "chat": chat, "temperature": temperature, "graphs": graphs, "chunk": prefill_chunk}
    return generated(Path(target), prompt, stream=stream, trust_remote_code=trust_remote_code, **options)
