"""The model card's sections on results: the student's fidelity, recall, tasks and speed, or that they were not measured."""

from collections.abc import Mapping

from distill.evaluation.stored import evaluations_of
from distill.evaluation.suites import evaluation
from distill.reports import shown
from distill.reports.run_page import fullest, scored_tasks
from distill.reports.tables import (
    PAIRED,
    PAIRED_SAYS,
    as_markdown,
    headline_cells,
    in_sample,
    markdown,
    text_of,
    with_tasks,
)
from distill.runs.run_dir import RunDir

NOT_MEASURED = "Not measured."
BY_SUITE = "Not measured. `distill eval RUN --suite {}` measures it; a later export then shows it."
FURTHER = {"Recall": (("passkey", "recall"), "standard"), "Tasks": (("tasks",), "quick"), "Speed": (("speed",), "standard")}


def results(run: RunDir | None) -> str:
    """Return the sections on fidelity, recall, tasks and speed.

    Raises:
        UserError: evaluations.json is damaged.
    """
    evaluations = evaluations_of(run) if run else {}
    with shown([run] if run else []):
        parts = ["## Fidelity", _fidelity(evaluations)]
        for title, (names, suite) in FURTHER.items():
            parts += [f"## {title}", _tables(evaluations, names) or (BY_SUITE.format(suite) if run else NOT_MEASURED)]
        return "\n\n".join(parts)


def _fidelity(evaluations: Mapping) -> str:
    judged = evaluations.get("final") or fullest(evaluations, "fidelity")
    if not judged:
        return NOT_MEASURED
    columns, lines = with_tasks(*headline_cells(judged), scored_tasks(evaluations))
    said = [
        f"{text_of(judged['rows']['student']['fidelity'])}; {judged['device']}, {judged['precision']}. KL in nats a token."
    ]
    said += [PAIRED_SAYS] if PAIRED[0] in columns else []
    said += [in_sample(judged)] if in_sample(judged) else []
    said.append("Every row was measured with the weights as trained, not with the export's rounded weights.")
    return f"{markdown(columns, list(lines.values()))}\n\n{' '.join(said)}"


def _tables(evaluations: Mapping, names: tuple[str, ...]) -> str:
    """Return the tables of the named evaluations, each from the most thorough suite that has it."""
    parts = []
    for name in names:
        judged = scored_tasks(evaluations) if name == "tasks" else fullest(evaluations, name)
        if judged:
            where = f"suite {judged['suite']}, {judged['device']}, {judged['precision']}"
            parts += [f"{title} ({where}):\n\n{as_markdown(found)}" for title, found in evaluation(name).tables(judged)]
    return "\n\n".join(parts)
