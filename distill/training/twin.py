"""The window-only control (`twin`): the student's layout with the windows of its mixers and no states, trained the same.

The student's gain over its twin is due to its states; see `evaluation.baselines`.
"""

from collections.abc import Sequence
from typing import cast

from distill.errors import UserError
from distill.evaluation.baselines import has_window_branch, twin_layout, window_layout
from distill.evaluation.stored import evaluations_of
from distill.evaluation.suites import suite_of_run
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.stages import check_student, stages_of
from distill.stages.layouts import students_of
from students.config import Layout
from teachers.teacher import Teacher


def check_twin(recipe: Recipe, layout: Layout, layouts: Sequence[Layout], teacher: Teacher) -> None:
    """Refuse `twin: true` where no twin can be made or trained. The teacher's weights may be on the meta device.

    Args:
        layout: the first one. layouts: that of each stage.

    Raises:
        UserError: naming the recipe and what does not fit.
    """
    if recipe.twin and recipe.student is not None:
        raise UserError(
            f"{recipe.name}: twin: true trains windows that are made from the teacher's attention, but this run starts from "
            f"the student {recipe.student}; leave one of them out"
        )
    if recipe.twin and not has_window_branch(layouts[-1]):
        raise UserError(f"{recipe.name}: twin: true needs mixers with a window branch; this layout has none")
    if recipe.twin:
        twin, where = twin_recipe(recipe, layout, layouts), f"{recipe.name} (twin)"
        check_student(twin, students_of(twin, teacher, twin_layout(layout), where), where)


def twin_recipe(recipe: Recipe, layout: Layout, layouts: Sequence[Layout] = ()) -> Recipe:
    """The twin's recipe: the same stages for the same layouts, with windows only.

    The twin skips some stages, such as orient; their tokens are added to its next stage.

    Args:
        layout: the student's first one. layouts: that of each stage, if some convert further layers.
    """
    stages, spare = [], 0
    for entry in stages_of(recipe):
        if not entry.kind.for_twin:
            spare += entry.options.tokens
            continue
        given = dict(recipe.stages[entry.index][entry.name])
        if spare and entry.kind.trains:
            given["tokens"], spare = entry.options.tokens + spare, 0
        if entry.kind.changes_layout:  # the twin converts the same layers as the student
            given = {name: value for name, value in given.items() if name not in ("layers", "mixer")}
            given["pattern"] = layouts[entry.index].pattern
        stages.append({entry.name: given})
    mixers = twin_layout(layouts[-1] if layouts else layout).mixers
    return recipe.model_copy(update={"mixers": mixers, "stages": stages, "twin": False, "export": [], "selected": None})


def known_results(recipe: Recipe, folder: RunDir, layout: Layout) -> dict[str, dict]:
    """Results that the stages of a run and its twin measured already, if the final table is on the same text."""
    options, seq_len = recipe.evaluation, recipe.evaluation.seq_len or recipe.data.seq_len
    final, _ = suite_of_run(options).text(options, seq_len)
    if -(-final // seq_len) != -(-options.tokens // seq_len):  # windows
        return {}

    def last(evaluations: dict) -> dict:
        after = list(evaluations.get("after", {}).values())
        return {"fidelity": after[-1]} if after and "kl" in after[-1] else {}

    found = evaluations_of(folder)
    known = {"student": last(found)}
    first = (cast(str, recipe.pattern) * len(layout.pattern))[: len(layout.pattern)]  # layout of the row "untrained"
    if first == layout.pattern and twin_layout(layout) == window_layout(layout) and "untrained" in found:
        known["window_layout"] = {"fidelity": found["untrained"]}
    twin = folder.path / "twin"
    return {**known, "twin": last(evaluations_of(RunDir(twin)))} if twin.exists() else known
