"""Resolution of a selection: replaces it in the recipe by the selected layout, for `distill run` and `distill select`."""

from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console

from distill.memory import or_cpu
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection import scorer_class
from distill.selection.checking import marked, selection_options
from distill.selection.measurer import FILE, MATERIAL, TEACHER, Measurer, Records
from distill.selection.measures import tokens_of
from distill.selection.options import Options, described, rest_of
from distill.selection.periodic import best_interval
from distill.selection.scorer import Choice, Ranked, Scorer
from distill.stages.layouts import later_letters
from students.config import KEEP

READS = "words and held-out text that no table reads"  # earlier versions measured on other texts; these must not be mixed
JUDGED = ("recall", "kl")  # the measures of the teacher, the choice and an even layout at the end
TRAINING = 4.0  # cost of a training token in tokens of a measurement: both branches, backward, and the teacher


def resolve(session: Session, folder: RunDir, console: Console, stopper: Stopper) -> tuple[Recipe, dict[str, Any]]:
    """Select the layout that the session's recipe asks for, or read what an earlier call selected in this folder.

    Returns:
        the recipe with the layout written out, which is also in the folder's resolved.yaml, and `chosen` of selection.json:
        by, options, pattern, mixers, layers, heads, ranking [{name, score, numbers, kept}], models {teacher, chosen, even:
        numbers}, cost {tokens, seconds, predicted_seconds}, note. With `periodic: true` also periodic {every, score, free,
        free_score} (see `periodic.best_interval`), and `free` among the models.

    Raises:
        UserError: the budget does not fit, or the folder has measurements of another teacher, recipe or text.
        Interrupted: stopped early, with all measurements kept.
    """
    recipe, options = session.recipe, selection_options(session.recipe)

    def choose(records: Records) -> dict[str, Any]:
        with stopper.listening():
            return _select(Measurer(session, options, records, console, stopper))

    chosen = chosen_once(session, folder, choose)
    selected = scorer_class(options.by).selected_by(options)
    layout = {"pattern": chosen["pattern"], "mixers": chosen["mixers"], "selected": selected}
    resolved = marked(recipe.model_copy(update=layout))
    if session.accelerator.is_main_process:
        folder.resolve(resolved)
    return resolved, chosen


def chosen_once(
    session: Session, folder: RunDir, choose: Callable[[Records], dict[str, Any]], file: str = FILE
) -> dict[str, Any]:
    """The choice in a file of the folder; if there is none, make the choice, share the first process's, and record it.

    Raises:
        UserError: the file holds measurements of another teacher, recipe or text.
    """
    accelerator = session.accelerator
    facts = {
        "recipe": session.recipe.fingerprint,
        "teacher": session.teacher.fingerprint,
        "heldout_text": session.heldout_windows.meta.sha256,
        MATERIAL: READS,
    }
    records = Records(folder, facts, accelerator.is_main_process, file)
    accelerator.wait_for_everyone()
    chosen = records.content.get("chosen")
    if chosen is None:
        chosen = choose(records)
        chosen = broadcast_object_list([chosen])[0] if accelerator.num_processes > 1 else chosen
        records.save(chosen=chosen)
    return chosen


def what_to_lower(session: Session) -> str:
    """The keys that determine a selection's memory."""
    return f"pattern.length, pattern.trials or pattern.tokens{or_cpu(session.accelerator.device)}"


def even_recipe(recipe: Recipe, layers: int, heads: int) -> Recipe:
    """The recipe with the same amount of attention, evenly spread, for checks and plans before anything is measured.

    Raises:
        UserError: the budget does not fit the number of layers.
    """
    options = selection_options(recipe)
    return _with_layout(recipe, options, scorer_class(options.by).even(options, layers, heads), layers)


def cost_of(options: Options, layers: int, heads: int) -> tuple[int, int]:
    """The approximate number of tokens that a selection reads in forward passes, and the number that it trains on."""
    scorer = scorer_class(options.by)
    reads = scorer.reads(options)
    passes = scorer.passes(options, layers, heads) * tokens_of(options, reads) if reads else 0
    return passes + (3 + options.periodic) * tokens_of(options, JUDGED), scorer.trains_on(options)


def _select(measurer: Measurer) -> dict[str, Any]:
    options, layers = measurer.options, measurer.layers
    found = chosen_by(measurer)
    heads = found["heads"]
    choice = Choice(found["layers"], None if heads is None else {int(layer): some for layer, some in heads.items()})
    recipe = _with_layout(measurer.session.recipe, options, choice, layers)
    return {**found, "pattern": recipe.pattern, "mixers": recipe.mixers}


def chosen_by(measurer: Measurer) -> dict[str, Any]:
    """The choice of the measurer's scorer: all of `chosen` (see `resolve`) except pattern and mixers."""
    options, layers, heads = measurer.options, measurer.layers, measurer.heads
    scorer = scorer_class(options.by)()
    even = scorer.even(options, layers, heads)  # refuses a budget that does not fit, before anything is measured
    for name in {*JUDGED, *scorer.reads(options)}:  # refuses texts that are too long and missing files
        measurer.material.prepare(name)
    models = {"teacher": scorer.measure(measurer, None, JUDGED)}
    predicted = _announce(measurer, scorer)
    ranking = scorer.rank(measurer)
    choice, periodic = scorer.choose(options, ranking, layers, heads), None
    if options.periodic:
        free = choice
        choice, periodic = best_interval(scorer, measurer, ranking, free)
        models["free"] = scorer.measure(measurer, free, JUDGED)
    models |= {"chosen": scorer.measure(measurer, choice, JUDGED), "even": scorer.measure(measurer, even, JUDGED)}
    records = measurer.records
    return {
        "by": options.by,
        "options": described(options),
        "layers": choice.layers,
        "heads": None if choice.heads is None else {str(layer): found for layer, found in choice.heads.items()},
        "ranking": [_entry(one, choice) for one in ranking],
        "models": models,
        "cost": {"tokens": records.tokens, "seconds": round(records.seconds, 1), "predicted_seconds": round(predicted, 1)},
        "note": scorer.note,
    } | ({} if periodic is None else {"periodic": periodic})


def _announce(measurer: Measurer, scorer: Scorer) -> float:
    """Print the coming measurements with their time, estimated from the teacher's own. Returns the seconds of all."""
    options, layers, heads = measurer.options, measurer.layers, measurer.heads
    reads, passes = scorer.reads(options), scorer.passes(options, layers, heads)
    if reads:
        scorer.measure(measurer, None, reads)
    known = measurer.records.of(TEACHER)
    judged = sum(known[name]["seconds"] for name in JUDGED)
    seconds = (3 + options.periodic) * judged + passes * sum(known[name]["seconds"] for name in reads)
    speed = sum(known[name]["tokens"] for name in JUDGED) / max(judged, 1e-9)
    seconds += TRAINING * scorer.trains_on(options) / speed
    tokens, training = cost_of(options, layers, heads)
    trains = f", and training on {training:,}" if training else ""
    measurer.console.print(
        f"  selecting by {options.by}: {passes} measurements and {3 + options.periodic} of layouts, about {tokens:,} "
        f"tokens{trains}, {seconds:,.0f} s (the teacher's own took {judged:.1f} s)",
        highlight=False,
    )
    measurer.expect(passes + 2 + options.periodic)
    return seconds


def _with_layout(recipe: Recipe, options: Options, choice: Choice, layers: int) -> Recipe:
    """The recipe with a choice written out: the letters of `rest`, repeated in order, where attention does not stay."""
    rest, letters = rest_of(recipe, options), []
    for layer in range(layers):
        converted = layer - sum(kept < layer for kept in choice.layers)
        letters.append(KEEP if layer in choice.layers else rest[converted % len(rest)])
    used = {*letters, *later_letters(recipe)}
    mixers = {letter: options for letter, options in recipe.mixers.items() if letter in used}
    if choice.heads is not None:
        mixers[rest] = {**mixers[rest], "keep": {str(layer): heads for layer, heads in choice.heads.items()}}
    return recipe.model_copy(update={"pattern": "".join(letters), "mixers": mixers})


def _entry(one: Ranked, choice: Choice) -> dict[str, Any]:
    whole = one.layer in choice.layers
    kept = whole if one.head is None else whole or one.head in (choice.heads or {}).get(one.layer, [])
    return {"name": one.name, "score": one.score, "numbers": one.numbers, "kept": kept}
