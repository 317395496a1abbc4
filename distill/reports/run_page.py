"""The report of one run, section by section. A section without data gives the reason."""

import html
from collections.abc import Mapping
from dataclasses import replace
from shlex import quote

from distill.evaluation.rows import NAMES, TITLES
from distill.evaluation.stored import evaluations_of
from distill.evaluation.suites import EVALUATIONS
from distill.evaluation.table import overlap_line, tables
from distill.reports import curves, recall
from distill.reports.layout import kinds_of, meaning, strip
from distill.reports.matrices import matrices_html
from distill.reports.page import Section, figures, note, page
from distill.reports.tables import (
    PAIRED,
    PAIRED_SAYS,
    facts,
    headline_cells,
    in_sample,
    printed,
    story_cells,
    table,
    text_of,
    with_tasks,
)
from distill.runs.run_dir import RunDir
from distill.selection.periodic import cost_line
from distill.selection.tables import models_table, ranking_table
from distill.stages import stages_of
from distill.stages.probe import probed_stages

SECTIONED = ("fidelity", "passkey", "recall", "tasks", "speed")  # evaluations with a section of their own below
FULLEST_FIRST = ("full", "standard", "quick")
NOT_JUDGED = "the run has not been evaluated yet; the same `distill run` continues it"
BY_SUITE = "`distill eval RUN --suite {}` measures it and adds it here"


def run_page(folder: RunDir) -> str:
    """The HTML report of a run."""
    recipe, evaluations = folder.laid_out(), evaluations_of(folder)
    judged = evaluations.get("final")
    said = f"{recipe.teacher} distilled into a hybrid. KL is in nats a token; ± is one standard error over documents."
    sections = [
        _headline(evaluations),
        _layout(recipe, judged, folder.read("selection.json", {}).get("chosen"), evaluations.get("after", {})),
        _story(evaluations, evaluations_of(RunDir(folder.path / "twin"))),
        _losses(folder),
        _layers(evaluations),
        _breakdown(judged),
        _matrices(folder),
        _recall(evaluations),
        _tasks(evaluations),
        _speed(evaluations),
        _samples(folder),
    ]
    if stopped := folder.read("run.json", {}).get("stopped"):
        sections = [replace(one, missing=stopped) if one.missing == NOT_JUDGED else one for one in sections]
    sections += _further(evaluations)
    sections.append(_not_run(evaluations, [section for section in sections if not section.body]))
    return page(recipe.name, said, [*sections, _facts(folder, evaluations)])


def fullest(evaluations: Mapping, evaluation: str) -> Mapping | None:
    """The results of the most thorough suite that has an evaluation; None if no suite has it."""
    suites = evaluations.get("suites", {})
    found = [suites[name] for name in FULLEST_FIRST if name in suites]
    found += [evaluations["final"]] if "final" in evaluations else []
    return next((judged for judged in found if judged["rows"]["teacher"].get(evaluation)), None)


def scored_tasks(evaluations: Mapping) -> Mapping | None:
    """The results of the most thorough suite with a score on any task; None if there is none."""
    judged = fullest(evaluations, "tasks")
    scored = judged and any("score" in result for result in judged["rows"]["teacher"]["tasks"].values())
    return judged if scored else None


def measured_by(judged: Mapping) -> str:
    """A remark that names the suite, device and precision of the numbers."""
    how = "The final table of the run" if judged["suite"] == "run" else f"Suite {judged['suite']}"
    return note(f"{how}, on {judged['device']}, {judged['precision']}.")


def _headline(evaluations: Mapping) -> Section:
    judged = evaluations.get("final") or fullest(evaluations, "fidelity")
    body = ""
    if judged:
        columns, lines = with_tasks(*headline_cells(judged), scored_tasks(evaluations))
        read = text_of(judged["rows"]["student"]["fidelity"])
        body = table(columns, list(lines.values()), marked=list(lines).index("student"))
        body += note(f"{read}; {judged['device']}, {judged['precision']}. Passkeys: recalled / asked.")
        body += note(f"{said[0].upper()}{said[1:]}.") if (said := overlap_line(judged)) else ""
        body += note(PAIRED_SAYS) if PAIRED[0] in columns else ""
        body += note(in_sample(judged)) if in_sample(judged) else ""
        body += figures(curves.kl_intervals(judged["rows"]))
    return Section("headline", "Student, baselines, teacher", body, NOT_JUDGED)


def _layout(recipe, judged: Mapping | None, chosen: Mapping | None, after: Mapping) -> Section:
    """The layout. chosen: the result of a selection of layers or heads, if the recipe has one. after: the results after each
    stage."""
    body = ""
    if judged:
        body = strip(judged["pattern"], recipe.mixers, kinds_of(recipe.mixers)) + meaning(judged["pattern"], recipe.mixers)
    for key, found in after.items() if judged else ():
        if found.get("converted") and found.get("identity"):
            layers = ", ".join(map(str, found["converted"]))
            off = f"with their attention restored, the logits differed by {found['identity']['logits']:.1g}"
            body += note(f"Stage {key} converted layers {layers}; {off}.")
    if judged and chosen:
        body += note(f"Selected by {chosen['by']}, in {chosen['cost']['seconds']:,.0f} s, before training:")
        body += printed(models_table(chosen["models"]))
        if any(entry["score"] is not None for entry in chosen["ranking"]):
            body += printed(ranking_table(chosen))
        if found := chosen.get("periodic"):
            body += note(f"Layers: {cost_line(found, chosen['models'])}.")
        body += note(chosen["note"]) if chosen["note"] else ""
    return Section("layout", "Layout", body, NOT_JUDGED)


def _story(evaluations: Mapping, twin: Mapping) -> Section:
    """The results after each stage. twin: the evaluations in the folder of the window-only control, on the same text."""
    columns, lines = story_cells(evaluations)
    body = ""
    if lines:
        points = {("untrained" if line[0].startswith("untrained") else line[0]): line[2] for line in lines if line[2]}
        ended = [measured["kl"] for measured in twin.get("after", {}).values() if "kl" in measured]
        chart = curves.story(list(points), [float(value) for value in points.values()], ended[-1] if ended else None)
        body = table(columns, lines) + figures(chart)
    return Section("stages", "What each stage did", body, "no stage is finished yet")


def _losses(folder: RunDir) -> Section:
    runs = {"student": folder.metrics(), "window-only control": RunDir(folder.path / "twin").metrics()}
    runs = {name: metrics for name, metrics in runs.items() if metrics}
    body = curves.loss_curves(runs) if runs else ""
    return Section("losses", "Training losses", body, "no training step has been logged")


def _layers(evaluations: Mapping) -> Section:
    after = [measured["probe"] for measured in evaluations.get("after", {}).values()]
    charts = []
    by_layer = {stage: kind.layer_loss for stage, kind in probed_stages().items() if kind.layer_loss}
    for stage, shown in reversed(by_layer.items()):  # the last stage first
        found = [
            {name.partition("/")[2]: loss for name, loss in probe.items() if name.startswith(f"{stage}/")} for probe in after
        ]
        if len(found) > 1 and found[0] and found[-1]:
            moments = {"after the first stage": found[0], "after the last": found[-1]}
            moments = {
                name: {layer: shown.shown(loss) for layer, loss in losses.items()} for name, losses in moments.items()
            }
            charts.append(curves.layer_errors(shown.title, moments, shown.label))
    body = figures(*charts) + note("On one fixed held-out batch, with the teacher's inputs.") if charts else ""
    return Section("layers", "Layers, before and after", body, "it needs two finished stages")


def _breakdown(judged: Mapping | None) -> Section:
    body = ""
    if judged:
        rows = {row: results for row, results in judged["rows"].items() if row != "teacher"}
        sources = [entry["name"] for entry in rows["student"]["fidelity"]["by_source"]]
        lines = [
            [TITLES[row], *(f"{entry['kl']:.3f}" for entry in results["fidelity"]["by_source"])]
            for row, results in rows.items()
        ]
        by_source = table(["KL by source", *sources], lines, marked=list(rows).index("student"))
        body = figures(curves.by_position(judged["rows"])) + by_source
    return Section("breakdown", "By position and by source", body, NOT_JUDGED)


def _matrices(folder: RunDir) -> Section:
    body = matrices_html(folder.path / "matrices.npz")
    return Section("matrices", "Attention and mixer matrices", body, "they are made at the end of the run")


def _recall(evaluations: Mapping) -> Section:
    judged = fullest(evaluations, "recall") or fullest(evaluations, "passkey")
    body = ""
    if judged:
        rows = [row for row in ("student", "twin", "teacher") if row in judged["rows"]]
        models = {NAMES[row]: judged["rows"][row] for row in rows}
        colours = [curves.ROW_COLOURS[row] for row in rows]
        selected = judged.get("in_sample", {}).get("families", [])
        maps = [*recall.family_maps(models, colours, selected), *recall.depth_maps(models, colours)]
        body = figures(*maps) + _printed(judged, "passkey", "recall")
        body += note(f"* {in_sample(judged)}") if selected else ""
        if not fullest(evaluations, "recall"):
            body += note(f"The other families: {BY_SUITE.format('standard')}.")
    return Section("recall", "Recall", body, BY_SUITE.format("standard"))


def _tasks(evaluations: Mapping) -> Section:
    judged, asked = scored_tasks(evaluations), fullest(evaluations, "tasks")
    reason = BY_SUITE.format("quick")
    if asked and not judged:
        reason = next(result["not_run"] for result in asked["rows"]["teacher"]["tasks"].values())
    return Section("tasks", "Tasks", _printed(judged, "tasks") if judged else "", reason)


def _speed(evaluations: Mapping) -> Section:
    judged = fullest(evaluations, "speed")
    body = ""
    if judged:
        models = {row: judged["rows"][row]["speed"] for row in ("student", "teacher")}
        drawn = curves.speed_curves(models, [curves.ROW_COLOURS[row] for row in models])
        body = (
            drawn
            + note(f"Measured on {models['student']['device']} ({models['student']['method']}).")
            + _printed(judged, "speed")
            if drawn
            else ""
        )
    return Section("speed", "Speed and memory", body, BY_SUITE.format("standard"))


def _further(evaluations: Mapping) -> list[Section]:
    """A section for each measured evaluation that has no section above."""
    found = []
    for name in EVALUATIONS:
        if name not in SECTIONED and (judged := fullest(evaluations, name)):
            found.append(Section(name, name.replace("_", " ").capitalize(), _printed(judged, name)))
    return found


def _printed(judged: Mapping, *evaluations: str) -> str:
    """The tables that `distill eval` prints for some evaluations, as HTML."""
    parts = [
        f"<h3>{html.escape(title)}</h3>{printed(found)}" for name, title, found in tables(judged) if name in evaluations
    ]
    full = {NAMES[row]: TITLES[row].removeprefix(f"{NAMES[row]}: ") for row in judged["rows"]}
    spelled = "; ".join(f"{short}: {title}" for short, title in full.items() if short != title)
    return "".join(parts) + measured_by(judged) + note(spelled)


def _samples(folder: RunDir) -> Section:
    samples = folder.read("samples.json", {})
    body = "".join(
        f"<h3>{name}</h3><blockquote><b>{html.escape(samples['prompt'])}</b>{html.escape(samples[name])}</blockquote>"
        for name in ("teacher", "student")
        if samples
    )
    return Section("samples", "Continuations of one prompt", body, "they are written at the end of the run")


def _not_run(evaluations: Mapping, empty: list[Section]) -> Section:
    lines = [[section.title, "", "", section.missing] for section in empty]
    for judged in [*evaluations.get("suites", {}).values(), *([evaluations["final"]] if "final" in evaluations else [])]:
        for entry in judged["not_run"]:
            what = " ".join(part for part in (entry["evaluation"], entry["part"]) if part and part != "every")
            suite = "the end of the run" if judged["suite"] == "run" else f"suite {judged['suite']}"
            lines.append(
                [what or "every evaluation", ", ".join(NAMES.get(row, row) for row in entry["rows"]), suite, entry["reason"]]
            )
    body = (
        table(["what", "for which rows", "in", "why"], lines, words=True)
        if lines
        else note("Every requested evaluation was run.")
    )
    return Section("not-run", "What was not run, and why", body)


def _facts(folder: RunDir, evaluations: Mapping) -> Section:
    recipe, run = folder.recipe(), folder.read("run.json", {})
    after = evaluations.get("after", {})
    spent = ", ".join(f"{entry.name} {entry.options.tokens:,}" for entry in stages_of(recipe))
    lines = [
        ("command", f"distill run {quote(f'{recipe.name}.yaml')}    (with the recipe below)"),
        ("run folder", str(folder.path)),
        ("recipe", f"fingerprint {recipe.fingerprint}, seed {recipe.seed}"),
        ("tokens by stage", spent),
        (
            "seconds by stage",
            ", ".join(f"{key.partition('-')[2]} {measured['seconds']:g}" for key, measured in after.items()),
        ),
        ("teacher", f"{recipe.teacher}, fingerprint {run.get('teacher', 'not recorded yet')}"),
        ("training text", f"SHA-256 {run.get('train_text', 'not recorded yet')}"),
        ("held-out text", f"SHA-256 {run.get('heldout_text', 'not recorded yet')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())),
    ]
    for suite in evaluations.get("suites", {}).values():
        target = quote(suite.get("target") or str(folder.path))
        lines.append(("evaluated by", f"distill eval {target} --suite {quote(suite['suite'])}    ({suite['device']})"))
    text = recipe.yaml()
    shown = f"<details open><summary>{html.escape(recipe.name)}.yaml</summary><pre>{html.escape(text)}</pre></details>"
    return Section("facts", "How this run was made", facts([line for line in lines if line[1]]) + shown)
