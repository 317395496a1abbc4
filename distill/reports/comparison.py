"""The page that compares several runs: a table with one line for each run, common loss curves, and all layouts."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from distill.evaluation.pairing import paired
from distill.evaluation.recall import in_sample
from distill.evaluation.rows import decimal
from distill.evaluation.stored import evaluations_of
from distill.recipe import Recipe
from distill.reports import curves, recall
from distill.reports.layout import kinds_of, strip
from distill.reports.page import Section, figures, note, page
from distill.reports.run_page import NOT_JUDGED, fullest, scored_tasks
from distill.reports.svg import intervals
from distill.reports.tables import PASSKEY, fidelity_cells, paired_cells, table, with_tasks
from distill.runs.run_dir import RunDir
from distill.stages import stages_of
from distill.stages.probe import judged_layer_loss

BASELINES = {
    "no_state": "with its states set to zero",
    "twin": "of its window-only control",
    "window_layout": "of untrained windows in its layout",
    "window_everywhere": "of untrained windows in every layer",
}
SAME = {"teacher": "teachers", "heldout_text": "held-out texts"}  # entries of run.json that must be equal to compare numbers


@dataclass(frozen=True)
class ShownRun:
    """The data of one run. name: its folder's name."""

    name: str
    recipe: Recipe
    facts: Mapping
    evaluations: Mapping
    metrics: Sequence[Mapping]

    @classmethod
    def of(cls, folder: RunDir) -> "ShownRun":
        """Read a run folder."""
        evaluations = evaluations_of(folder)
        return cls(folder.path.resolve().name, folder.laid_out(), folder.read("run.json", {}), evaluations, folder.metrics())

    @property
    def final(self) -> Mapping:
        """As `judged`, for a run that has a final table."""
        return cast(Mapping, self.judged)

    @property
    def judged(self) -> Mapping | None:
        """The results at the end of the run; None before."""
        return self.evaluations.get("final")


def compare_page(folders: Sequence[RunDir]) -> str:
    """The HTML page that compares runs."""
    runs = _named([ShownRun.of(folder) for folder in folders])
    judged = {name: run for name, run in runs.items() if run.judged}
    sections = [
        _headline(judged),
        _layouts(judged),
        _losses(runs),
        _layers(judged),
        _recall(runs),
        _not_run(runs, judged),
        _facts(runs),
    ]
    said = f"{len(runs)} runs. KL is in nats a token; ± is one standard error over documents. {_differences(runs)}"
    return page("Runs compared", said, sections)


def _named(runs: Sequence[ShownRun]) -> dict[str, ShownRun]:
    """Runs by name; runs of the same name get numbers."""
    found: dict[str, ShownRun] = {}
    for run in runs:
        count = sum(other.name == run.name for other in found.values())
        found[run.name if not count else f"{run.name} ({count + 1})"] = run
    return found


def _differences(runs: Mapping[str, ShownRun]) -> str:
    """A sentence on why the runs' numbers are not comparable; empty if they are."""
    differ = [what for key, what in SAME.items() if len({run.facts.get(key) for run in runs.values()}) > 1]
    judged = {run.judged["rows"]["student"]["fidelity"]["tokens"] for run in runs.values() if run.judged}
    differ += ["numbers of held-out tokens"] if len(judged) > 1 else []
    return f"The numbers of these runs are not comparable: their {' and '.join(differ)} differ." if differ else ""


def _headline(judged: Mapping[str, ShownRun]) -> Section:
    body = ""
    if judged:
        lines = {name: _line(run.final) for name, run in judged.items()}
        lengths = sorted({length for line in lines.values() for length in line["passkey"]})
        first, *others = judged.values()
        columns = [
            "run",
            "held-out KL",
            *(["KL less the first run's", "lower on"] if others else []),
            "top-1 agreement",
            "perplexity",
            *(f"KL {spelled}" for spelled in BASELINES.values()),
            "teacher's perplexity",
        ]
        columns += [f"passkey {length}" for length in lengths] + ["mean of tasks", "recovery"]
        cells = []
        for name, line in lines.items():
            passkeys = [line["passkey"].get(length, "not run") for length in lengths]
            tasks = _task_cells(judged[name].evaluations)
            kl, *fidelity = line["fidelity"]
            against = _paired(judged[name], first) if others else []
            cells.append([name, kl, *against, *fidelity, *line["baselines"], line["teacher"], *passkeys, *tasks])
        points = [
            (
                name,
                run.final["rows"]["student"]["fidelity"]["kl"],
                run.final["rows"]["student"]["fidelity"]["kl_error"] or 0.0,
                colour,
            )
            for colour, (name, run) in enumerate(judged.items())
        ]
        body = table(columns, cells) + figures(
            intervals("held-out KL, ± one standard error over documents", points, "nats a token")
        )
    return Section("headline", "Students", body, NOT_JUDGED)


def _paired(run: ShownRun, first: ShownRun) -> list[str]:
    """A student's KL less that of the first run's student, if both were evaluated on the same documents of one text."""
    same = all(run.facts.get(key) == first.facts.get(key) for key in SAME)
    own, other = (one.final["rows"]["student"]["fidelity"] for one in (run, first))
    found = paired(own, other) if same and run is not first else {}
    return paired_cells(found, "student")


def _line(judged: Mapping) -> dict:
    """The cells of one run's student and of its baselines."""
    rows = judged["rows"]
    student = rows["student"]
    return {
        "fidelity": fidelity_cells(student["fidelity"], with_error=True),
        "baselines": [fidelity_cells(rows[row]["fidelity"])[0] if row in rows else "not run" for row in BASELINES],
        "teacher": decimal(rows["teacher"]["fidelity"]["perplexity"], 2),
        "passkey": {cell["length"]: _recalled(judged, cell) for cell in student.get("passkey", [])},
    }


def _recalled(judged: Mapping, cell: Mapping) -> str:
    """The passkeys recalled out of all, or "in-sample" if passkeys selected the layout."""
    return "in-sample" if PASSKEY in in_sample(judged) else f"{cell['recalled']}/{cell['trials']}"


def _task_cells(evaluations: Mapping) -> list[str]:
    columns, lines = with_tasks([], {"student": []}, scored_tasks(evaluations))
    return lines["student"] if columns else ["not run", ""]


def _layouts(judged: Mapping[str, ShownRun]) -> Section:
    kinds = kinds_of(*(run.recipe.mixers for run in judged.values()))
    body = "".join(
        f"<h3>{html.escape(name)}</h3>{strip(run.final['pattern'], run.recipe.mixers, kinds, one_line=True)}"
        for name, run in judged.items()
    )
    said = note(
        "Colours: "
        + "; ".join(
            f"{letter} in {name}: {options['mixer']}"
            for name, run in judged.items()
            for letter, options in run.recipe.mixers.items()
        )
    )
    return Section("layout", "Layouts", body + said if body else "", NOT_JUDGED)


def _losses(runs: Mapping[str, ShownRun]) -> Section:
    metrics = {name: run.metrics for name, run in runs.items() if run.metrics}
    body = curves.loss_curves(metrics) if metrics else ""
    return Section("losses", "Training losses", body, "no training step has been logged")


def _layers(judged: Mapping[str, ShownRun]) -> Section:
    measured = {name: run.final["layers"] for name, run in judged.items() if run.final["layers"]}
    _, how = judged_layer_loss()
    body = figures(curves.layer_errors(f"{how.title}, finished", measured, how.label)) if measured else ""
    return Section("layers", "Layers", body, NOT_JUDGED)


def _recall(runs: Mapping[str, ShownRun]) -> Section:
    found = {name: fullest(run.evaluations, "recall") for name, run in runs.items()}
    models = {name: judged["rows"]["student"] for name, judged in found.items() if judged}
    colours = range(len(models))
    body = figures(*recall.family_maps(models, colours), *recall.depth_maps(models, colours)) if models else ""
    return Section("recall", "Recall", body, "`distill eval RUN --suite standard` measures it and adds it here")


def _not_run(runs: Mapping[str, ShownRun], judged: Mapping[str, ShownRun]) -> Section:
    lines = [
        [name, "the evaluation", run.facts.get("stopped") or NOT_JUDGED] for name, run in runs.items() if name not in judged
    ]
    for name, run in judged.items():
        for entry in run.final["not_run"]:
            lines.append([name, " ".join([*entry["rows"], entry["evaluation"], entry["part"]]).strip(), entry["reason"]])
        if not fullest(run.evaluations, "recall"):
            lines.append([name, "recall", "`distill eval RUN --suite standard` measures it"])
        if not scored_tasks(run.evaluations):
            lines.append([name, "tasks", "`distill eval RUN --suite quick --tasks FOLDER` measures them"])
    body = table(["run", "what", "why"], lines, words=True) if lines else note("Every requested evaluation was run.")
    return Section("not-run", "What was not run, and why", body)


def _facts(runs: Mapping[str, ShownRun]) -> Section:
    columns = ["run", "recipe", "seed", "training tokens", "seconds", "distill", "torch", "teacher", "held-out text"]
    lines = []
    for name, run in runs.items():
        versions, stages = run.facts.get("versions", {}), stages_of(run.recipe)
        seconds = sum(measured["seconds"] for measured in run.evaluations.get("after", {}).values())
        lines.append(
            [
                name,
                f"{run.recipe.name} {run.recipe.fingerprint}",
                str(run.recipe.seed),
                f"{sum(entry.options.tokens for entry in stages):,}",
                f"{seconds:.0f}",
                versions.get("distill", ""),
                versions.get("torch", ""),
                run.facts.get("teacher", ""),
                run.facts.get("heldout_text", "")[:16],
            ]
        )
    return Section("facts", "How these runs were made", table(columns, lines))
