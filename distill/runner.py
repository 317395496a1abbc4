"""`distill run`: the student, its twin if asked for, their evaluation, the report and the exports."""

import shutil
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from distill import adapters, trackers
from distill.build import build, empty, layout_of
from distill.console import new_console
from distill.disk import writing
from distill.errors import UserError
from distill.evaluate.baselines import has_window_branch, twin_layout, window_layout
from distill.evaluate.fidelity import fidelity
from distill.evaluate.target import judge_session
from distill.memory import enough_memory
from distill.pipeline import Pipeline, check_rates
from distill.recipe import Recipe
from distill.run_dir import RunDir, alone
from distill.select.options import selects
from distill.select.resolve import even_recipe, resolve
from distill.select.show import strip
from distill.session import Session, deadline
from distill.trainer import Stopper


def run(
    recipe: Recipe,
    *,
    runs: str | Path = "runs",
    fresh: bool = False,
    stop_after: float | None = None,
    console: Console | None = None,
) -> RunDir:
    """Take a recipe to its end, or go on where an earlier run of it stopped.

    Args:
        runs: where run folders are made. fresh: throw away what an earlier run left. stop_after: minutes after which to
            save and stop.

    Raises:
        UserError: anything the user can mend. Interrupted: stopped early, everything saved.
    """
    if stop_after is not None and stop_after <= 0:
        raise UserError(f"--stop-after is {stop_after:g}; it takes minutes, more than 0")
    console = console or new_console(stderr=True)
    finished = None if fresh else RunDir.finished(recipe, Path(runs))
    if finished is not None:
        _show(finished, console)
        return finished
    trackers.check(recipe)
    stopper = Stopper(deadline(stop_after))
    with console.status("loading the teacher and preparing the text"):  # seen on a terminal only
        session = Session.open(recipe, RunDir.path_of(recipe, Path(runs)))
    _check_layout(session)
    main = session.accelerator.is_main_process
    console = console if main else Console(quiet=True)
    with alone(RunDir.path_of(recipe, Path(runs))) if main else nullcontext():
        with session.accelerator.main_process_first():
            folder = RunDir.open(recipe, Path(runs), fresh and main)
        console.print(f"[bold]{recipe.name}[/]  {folder.path}")
        try:
            with enough_memory("the run", "data.micro_batch, data.seq_len or evaluation.tokens"):
                _select_layout(session, folder, console, stopper)
                _take_all(session, folder, console, stopper)
        finally:
            trackers.finish(session.accelerator)
    session.accelerator.end_training()
    return folder


def _check_layout(session: Session) -> None:
    """Refuse a layout, a rate or a twin that cannot be, before a folder is made and the student has trained.

    Raises:
        UserError: naming the recipe and what does not fit.
    """
    recipe, teacher = session.recipe, session.teacher
    if selects(recipe):  # the layout is not known yet, but one like it is
        recipe = even_recipe(recipe, teacher.n_layers, teacher.config.num_attention_heads)
    layout = layout_of(recipe.pattern, recipe.mixers, teacher.n_layers, recipe.name, recipe.meta_tokens)
    check_rates(recipe, empty(teacher, layout), recipe.name)
    if recipe.twin and not has_window_branch(layout):
        raise UserError(f"{recipe.name}: twin: true needs mixers with a window branch; this layout has none")
    if recipe.twin:
        check_rates(twin_recipe(recipe, layout), empty(teacher, twin_layout(layout)), f"{recipe.name} (twin)")


def _select_layout(session: Session, folder: RunDir, console: Console, stopper: Stopper) -> None:
    """Where the recipe says how its layout is selected: do that, and go on with the recipe that says the layout."""
    if not selects(session.recipe):
        return
    session.recipe, chosen = resolve(session, folder, console, stopper)
    console.print(f"  layout selected by {chosen['by']}: {strip(session.recipe.pattern)}")
    _check_layout(session)


def _take_all(session: Session, folder: RunDir, console: Console, stopper: Stopper) -> None:
    """The student's stages, its twin's if asked for, and the conclusion."""
    recipe = session.recipe
    heldout = session.heldout(recipe.evaluation.tokens)
    pipeline = Pipeline(session, recipe, folder, console, stopper)
    _announce(pipeline, heldout, console)
    pipeline.run(heldout)
    if session.accelerator.is_main_process:
        _save_student(pipeline)
    if recipe.twin:
        _run_twin(session, recipe, pipeline, heldout, console, stopper)
    if session.accelerator.is_main_process:
        _conclude(session, folder, pipeline.student, console)


def twin_recipe(recipe: Recipe, layout) -> Recipe:
    """The same training for the same layout with the windows alone; what orient would read goes to the stage after it."""
    stages, spare = [], 0
    for name, options in recipe.stage_options():
        if name == "orient":
            spare += options.tokens
            continue
        given = dict(next(stage[name] for stage in recipe.stages if name in stage))
        if spare and name != "initialise":
            given["tokens"], spare = options.tokens + spare, 0
        stages.append({name: given})
    mixers = twin_layout(layout).mixers
    return recipe.model_copy(update={"mixers": mixers, "stages": stages, "twin": False, "export": []})


def _announce(pipeline: Pipeline, heldout, console: Console) -> None:
    """Say what is converted, and what the untrained windows of the same layout reach: the bar to clear."""
    layout, folder = pipeline.layout, pipeline.folder
    session = pipeline.session
    precision = {"no": "float32"}.get(session.accelerator.mixed_precision, session.accelerator.mixed_precision)
    console.print(
        f"  teacher {pipeline.teacher.reference}: {len(layout.converted)} of {len(layout.pattern)} layers get a mixer "
        f"({session.accelerator.device}, {precision})"
    )
    evaluations = folder.read("evaluations.json", {})
    if "untrained" not in evaluations and session.accelerator.is_main_process:
        student, _ = build(pipeline.teacher, twin_layout(layout))
        with session.accelerator.autocast():
            evaluations["untrained"] = fidelity(pipeline.teacher, student, heldout)
        folder.write("evaluations.json", evaluations)
    if "untrained" in evaluations:
        measured = evaluations["untrained"]
        console.print(
            f"  {'untrained':<10}            held-out KL {measured['kl']:.3f}   agreement {measured['agreement']:.1%}   "
            f"perplexity {measured['perplexity']:.2f}   (the windows alone; teacher {measured['teacher_perplexity']:.2f})"
        )


def _save_student(pipeline: Pipeline) -> None:
    """The finished student with its tokenizer, loadable by transformers."""
    student, teacher, folder = pipeline.student, pipeline.teacher, pipeline.folder
    student.config.distill["teacher"] = {"reference": teacher.reference, "fingerprint": teacher.fingerprint}
    scratch = folder.path / ".student"
    with writing(folder.student):
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed here
        adapters.save(student, scratch)
        teacher.tokenizer.save_pretrained(scratch)
        if folder.student.exists():
            shutil.rmtree(folder.student)
        scratch.rename(folder.student)


def _run_twin(session: Session, recipe: Recipe, pipeline: Pipeline, heldout, console: Console, stopper: Stopper) -> None:
    twin = twin_recipe(recipe, pipeline.layout)
    folder = RunDir.at(pipeline.folder.path / "twin", twin, fresh=False)
    console.print("  [bold]twin[/]: the same windows, trained alone")
    trained = Pipeline(session, twin, folder, console, stopper, every_stage=False)
    trained.run(heldout)
    if session.accelerator.is_main_process:
        _save_student(trained)


def _conclude(session: Session, folder: RunDir, student, console: Console) -> None:
    """Judge every row, write the report and the exports."""
    from distill.export import export
    from distill.report import write_report
    from distill.samples import collect

    twin = folder.path / "twin" / "student"
    evaluations = folder.read("evaluations.json", {})
    console.print("  judging the student, its baselines and the teacher")
    known = _known(session.recipe, folder, student.layout)
    judged = judge_session(session, student, twin if twin.exists() else None, known=known)
    folder.write("evaluations.json", {**evaluations, "final": judged})
    with writing(f"the report in {folder.path}"):
        collect(session, student, folder)
        write_report(folder)
    for target in session.recipe.export:
        written = export(folder.path, to=target, out=folder.path / "export" / target)
        console.print(f"  exported to {written}")
    folder.update("run.json", finished=True)
    _show(folder, console)


def _show(folder: RunDir, console: Console) -> None:
    """The table that ends a run, and where the report is."""
    from distill.report import headline

    console.print(headline(folder.read("evaluations.json")["final"]))
    console.print(f"  report: {folder.path / 'report.html'}")


def _known(recipe: Recipe, folder: RunDir, layout) -> dict[str, dict]:
    """What the stages measured already, where the final table is on the same text."""
    if recipe.evaluation.final_tokens not in (None, recipe.evaluation.tokens):
        return {}

    def last(evaluations: dict) -> dict:
        after = list(evaluations.get("after", {}).values())
        return {"fidelity": after[-1]} if after else {}

    found = folder.read("evaluations.json")
    known = {"student": last(found)}
    if twin_layout(layout) == window_layout(layout):
        known["window_layout"] = {"fidelity": found["untrained"]}
    twin = folder.path / "twin"
    return {**known, "twin": last(RunDir(twin).read("evaluations.json"))} if twin.exists() else known
