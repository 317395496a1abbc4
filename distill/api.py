"""The Python API: one function for each verb of the command line, with the same options.

Imports are inside the functions, so that `import distill` and `distill --help` start without delay.
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
    """Compute what a run would do: layers, parameters, memory, tokens, time, exports. Loads no weights without `check`.

    Args:
        recipe: a file, a shipped recipe's name, or a mapping with a recipe's entries. overrides: "key.sub=value", one or
            several. check: also load the teacher, prepare the text, and try what a run tries before it trains. gpus,
            gpu_memory: as in `make_plan`.

    Returns:
        the numbers; `.numbers()` returns them as a mapping for JSON.

    Raises:
        UserError: the recipe is invalid, the teacher's config cannot be found, or the check fails.
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
        recipe, overrides: as in `plan`. fresh: delete what an earlier run left. runs: where run folders are made.
            stop_after: minutes after which to save and stop. gpus: the number of processes, with one GPU each. processes:
            the number of processes on a CPU. console: where progress is shown; the standard error by default, and always
            when there are several processes.

    Returns:
        the run folder: `.path`, `.read("evaluations.json")`.

    Raises:
        UserError: an error that the user can fix. Interrupted: stopped early, everything saved. Ended: one of several
            processes failed; the reason was printed to the standard error.
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
    """Choose which layers or heads of a recipe's teacher keep attention. Trains gates at most.

    Args:
        recipe, overrides: as in `plan`. If its pattern is written out, the selection keeps as much attention as the pattern
            does, and chooses the places anew. by, keep, tasks: as in a recipe's `pattern`. runs: where run folders are;
            measurements are kept in the recipe's run folder, and a call that was stopped continues from them. fresh:
            measure everything again. write: a file for the recipe with the chosen layout. console: where progress is
            shown; the standard error by default.

    Returns:
        `chosen` of the folder's selection.json, see `distill.selection.resolution.resolve`, and `folder`.

    Raises:
        UserError: an error that the user can fix. Interrupted: stopped early, everything measured is kept.
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
    """Evaluate a run folder, or a student's folder or hub id, against its teacher and the untrained baselines.

    The results of a run are saved in its folder, and its report is written again with them.

    Args:
        teacher: the teacher's reference, if the target does not name it or the teacher has moved. heldout: files of text (a
            glob) in place of the run's held-out text, or of the shipped text for a checkpoint. suite: quick, standard or
            full.
        tasks: a folder of task files (see evaluation/task_files.py), or "harness" for lm-evaluation-harness; DISTILL_TASKS
            by default. console: where progress is shown; nowhere by default.

    Returns:
        the results, as the docstring of `distill.evaluation` describes them.

    Raises:
        UserError: the target is not a student, the teacher is not its teacher, or the suite or folder does not exist.
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
    """Write the report of one run again, or one page that compares several runs. Returns the file's path.

    Args:
        runs: run folders. out: the file to write; by default report.html in the folder of one run, or comparison.html in
            the working directory for several.

    Raises:
        UserError: a folder is not a run folder or its results have another form, no run is named, or the file cannot be
            written.
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
    """Write the finished student of a run in a form that other software loads, and check it there before the export is kept.

    Args: as in `distill.exporters.exporting.export_student`. console: where progress is shown.

    Returns:
        the export's folder.

    Raises:
        UserError: the student is damaged, a file is in the way, or an engine's output differs from the student's.
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
    """Generate text with a student, from a prompt.

    Args:
        target: a run folder or a student's folder. tokens: the most new tokens. chat: wrap the prompt in the tokenizer's
            chat template. temperature: 0 takes the most likely token; a positive number samples. graphs: on a GPU, replay
            each token as one CUDA graph. trust_remote_code: run the code in the folder if no installed code can load it,
            without asking. prefill_chunk: tokens of the prompt that are read at a time; chosen by the free memory by
            default. stream: where the text is also written while it is generated, such as `sys.stdout`.

    Returns:
        the new text.

    Raises:
        UserError: the student is incomplete; an option, the prompt or the chat template cannot be used; or the logits are
            not finite.
    """
    from distill.generation import generated

    options: dict = {"tokens": tokens, "chat": chat, "temperature": temperature, "graphs": graphs, "chunk": prefill_chunk}
    return generated(Path(target), prompt, stream=stream, trust_remote_code=trust_remote_code, **options)
