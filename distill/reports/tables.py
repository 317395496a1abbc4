"""Tables of a report in HTML and Markdown, and the final table of a run in the terminal."""

import html
from collections.abc import Mapping, Sequence
from typing import cast

from rich.table import Table

from distill.evaluation.recall.families import title
from distill.evaluation.rows import TITLES, completion_cells, decimal, difference_of, error_of, lower_on
from distill.evaluation.suite import SIX
from distill.evaluation.table import overlap_line
from distill.reports.page import text
from distill.runs.run_dir import RunDir

PASSKEY = "passkey"
BAR = "\\|"  # a bar in a cell of a Markdown table
ON_COMPLETIONS = ["KL on completions", "agreement on them", "their bits a byte"]
PAIRED = ["student less this row", "student lower on"]
PAIRED_SAYS = (
    "Student less this row: the student's KL less the row's, document by document, ± one standard error. Student lower on: "
    "the number of documents on which the student's KL is lower. Ablation: the finished student without one branch."
)
ERRORS = "± one standard error over documents"
PREFERENCES = ["win share of held-out pairs", "reward margin"]
STORY = ["after", "seconds", "held-out KL", "top-1 agreement", "perplexity", "its own held-out loss, before -> after"]


def table(columns: Sequence[str], lines: Sequence[Sequence[str]], marked: int | None = None, words: bool = False) -> str:
    """An HTML table, which scrolls if it is wider than the page.

    Args:
        marked: the index of the student's line. words: the cells are text, not numbers.
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    rows = "".join(
        f"<tr{' class=student' if index == marked else ''}>{''.join(f'<td>{text(cell)}</td>' for cell in line)}</tr>"
        for index, line in enumerate(lines)
    )
    return f"<div class='scroll' tabindex='0'><table{' class=words' * words}><tr>{head}</tr>{rows}</table></div>"


def facts(lines: Sequence[tuple[str, str]]) -> str:
    """An HTML table of names and their values, one on each line."""
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in lines)
    return f"<table class='words facts'>{rows}</table>"


def printed(given: Table) -> str:
    """A terminal table in HTML; its bold line is the student's."""
    columns = [str(column.header) for column in given.columns]
    lines = list(zip(*(list(column.cells) for column in given.columns), strict=True))
    marked = next((index for index, row in enumerate(given.rows) if row.style == "bold"), None)
    return table(columns, [[str(cell) for cell in line] for line in lines], marked)


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows)


def as_markdown(given: Table) -> str:
    """A terminal table in Markdown."""
    cells = zip(*(list(column.cells) for column in given.columns), strict=True)
    return markdown([str(column.header) for column in given.columns], [[str(cell) for cell in line] for line in cells])


def headline(judged: Mapping) -> Table:
    """The final table of a run, for the terminal."""
    columns, lines = headline_cells(judged)
    caption = f"{text_of(judged['rows']['student']['fidelity'])}, {ERRORS}. {in_sample(judged)}".rstrip()
    caption = "\n".join(filter(None, (caption, overlap_line(judged))))
    found = Table(box=None, header_style="bold", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        found.add_column(column, justify="left" if index == 0 else "right", overflow="fold")  # nothing is cut off
    for name, cells in lines.items():
        found.add_row(*cells, style="bold" if name == "student" else "")
    return found


def headline_cells(judged: Mapping) -> tuple[list[str], dict[str, list[str]]]:
    """The column titles, and the cells by row: every model against the teacher, and the student against every model.

    Passkeys are left out if they selected the layout, because the choice would then be measured on its own criterion.
    """
    against, selected = judged.get("against_student", {}), judged.get("in_sample", {}).get("families", [])
    asked = [] if PASSKEY in selected else judged["rows"]["teacher"].get(PASSKEY, [])
    paired = PAIRED if any(against.values()) else []
    columns = ["", "held-out KL", *paired, "top-1 agreement", "perplexity"]
    said = any(results["fidelity"].get("completions") for results in judged["rows"].values())
    columns += ON_COMPLETIONS if said else []
    columns += [f"{PASSKEY} {entry['length']}" for entry in asked]
    preferred = any("preferences" in results for results in judged["rows"].values())
    columns += PREFERENCES if preferred else []
    lines = {}
    for name, results in judged["rows"].items():
        kl, *others = fidelity_cells(results["fidelity"], name != "teacher")
        passkeys = [f"{entry['recalled']}/{entry['trials']}" for entry in results.get(PASSKEY, [])[: len(asked)]]
        answers = completion_cells(results["fidelity"].get("completions")) if said else []
        known = results.get("preferences")
        pairs = (preference_cells(known) if known else [""] * len(PREFERENCES)) if preferred else []
        cells = [
            TITLES[name],
            kl,
            *paired_cells(against.get(name), name)[: len(paired)],
            *others,
            *answers,
            *passkeys,
            *pairs,
        ]
        lines[name] = cells
    return columns, lines


def paired_cells(found: Mapping | None, row: str) -> list[str]:
    """The student's KL less a row's, document by document, and the number of documents on which it is lower. Blank for the
    student and the teacher."""
    return ["", ""] if not found or row == "teacher" else [difference_of(found["kl"], 3), lower_on(found["kl"])]


def text_of(measured: Mapping) -> str:
    """The text that fidelity was measured on: its tokens and documents."""
    documents = len(measured.get("documents", {}).get("number", []))
    return f"On {measured['tokens']:,} held-out tokens" + (f" of {documents} documents" if documents else "")


def in_sample(judged: Mapping) -> str:
    """A sentence on the evaluations that selected the student's layout; empty if none did."""
    found = [name for names in judged.get("in_sample", {}).values() for name in names]
    called = ", ".join(title(name) for name in found)
    return f"In-sample: {called} selected the layout, on other items, and are left out of this table." if found else ""


def with_tasks(
    columns: list[str], lines: dict[str, list[str]], suite: Mapping | None
) -> tuple[list[str], dict[str, list[str]]]:
    """The headline's cells with a suite's mean over the six tasks, the recovery, and a row for chance."""
    rows = suite["rows"] if suite else {}
    selected = suite.get("in_sample", {}).get("tasks", []) if suite else []
    six = [task for task in SIX if "score" in rows.get("teacher", {}).get("tasks", {}).get(task, {})]
    six = [task for task in six if task not in selected]
    further = [f"mean of {len(six)} tasks", "recovery"] if six else []
    found = {name: cells + _task_cells(suite, name, six) for name, cells in lines.items()}
    first = zip(columns[1:], next(iter(lines.values()))[1:], strict=True) if columns else []
    guesses = [f"0/{cell.partition('/')[2]}" if column.startswith(PASSKEY) else "" for column, cell in first]
    chance = [f"{sum(cast(Mapping, suite)['chance'][task] for task in six) / len(six):.1%}", "0.0%"] if six else []
    return columns + further, {**found, "chance": ["chance", *guesses, *chance]}


def _task_cells(suite: Mapping | None, row: str, six: Sequence[str]) -> list[str]:
    """One row's mean over tasks and its recovery, each with its standard error."""
    if not six or suite is None:
        return []
    scored = suite["rows"].get(row, {}).get("tasks")
    if scored is None:
        return ["not run", ""]
    mean = sum(scored[task]["score"] for task in six) / len(six)
    error = sum((scored[task]["error"] or 0.0) ** 2 for task in six) ** 0.5 / len(six)
    found = suite["against_teacher"].get(row, {}).get("recovery", {"score": None})
    recovery = "" if found["score"] is None else f"{found['score']:.1%} ± {found['error']:.1%}"
    return [f"{mean:.1%} ± {error:.1%}", recovery]


def story_cells(evaluations: Mapping) -> tuple[list[str], list[list[str]]]:
    """The column titles and lines of the table on what each stage did on held-out text."""
    lines, columns = [], list(STORY)
    probe: dict[str, float] = {}
    preferred = any("preferences" in measured for measured in evaluations.get("after", {}).values())
    columns += PREFERENCES if preferred else []
    further = [""] * len(PREFERENCES) * preferred
    if "untrained" in evaluations:
        lines.append(["untrained windows", "", *fidelity_cells(evaluations["untrained"]), "", *further])
    for key, measured in evaluations.get("after", {}).items():
        stage = key.partition("-")[2]
        own = (
            f"{probe[stage]:.4f} -> {measured['probe'][stage]:.4f}" if stage in probe and stage in measured["probe"] else ""
        )
        shown = preference_cells(measured["preferences"]) if "preferences" in measured else further
        lines.append([stage, f"{measured['seconds']:.0f}", *fidelity_cells(measured), own, *shown])
        probe = measured["probe"]
    return columns, lines


def preference_cells(measured: Mapping) -> list[str]:
    """The share of held-out pairs whose chosen answer is preferred, the number of pairs, and the reward margin."""
    return [f"{measured['win_share']:.1%} of {measured['pairs']:,}", f"{measured['reward_margin']:.3f}"]


def fidelity_cells(measured: Mapping, with_error: bool = False) -> list[str]:
    """KL, top-1 agreement and perplexity; blank if not measured, as after most stages of a window-only control."""
    if "kl" not in measured:
        return ["", "", ""]
    error = error_of(measured["kl_error"], 3) if with_error else ""
    return [f"{measured['kl']:.3f}{error}", f"{measured['agreement']:.1%}", decimal(measured["perplexity"], 2)]


def markdown_report(folder: RunDir, evaluations: Mapping) -> str:
    """The text of report.md: the headline table and what each stage did."""
    recipe = folder.recipe()
    story = story_cells(evaluations)
    parts = [f"# {recipe.name}", f"Teacher: `{recipe.teacher}`. KL in nats a token on held-out text, {ERRORS}."]
    if "final" in evaluations:
        columns, lines = headline_cells(evaluations["final"])
        parts.append(markdown(columns, list(lines.values())))
        parts.append(f"{text_of(evaluations['final']['rows']['student']['fidelity'])}. {PAIRED_SAYS}")
        parts += [said for said in (in_sample(evaluations["final"]), overlap_line(evaluations["final"])) if said]
    return "\n\n".join([*parts, "## What each stage did", markdown(*story)]) + "\n"
