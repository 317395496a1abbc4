"""The report of a run: report.html, one file that needs nothing else, and report.md with the same tables."""

import html
from pathlib import Path

import numpy as np
from rich.table import Table

from distill import figures
from distill.errors import UserError
from distill.evaluate.rows import TITLES
from distill.run_dir import RunDir, write_text

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #6b7482; --line: #d9dee6; --back: #ffffff; --mark: #eef4ff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #98a2b3; --line: #333c4a; --back: #12161d; --mark: #1b2740; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; } p.note { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.student { background: var(--mark); font-weight: 600; }
svg, img { max-width: 100%; height: auto; } .pair { display: inline-block; margin: 0 1rem 1rem 0; }
.strip span { display: inline-block; width: 1.5rem; margin: 1px; text-align: center; border-radius: 3px;
  background: var(--line); font-size: .75rem; } .strip span.mixer { background: #2b7de9; color: white; }
blockquote { border-left: 3px solid var(--line); margin: .5rem 0; padding: .1rem 1rem; white-space: pre-wrap; }
code { font-size: .9em; } @media print { body { margin: 0; } }
"""


def write_report(folder: RunDir) -> Path:
    """Write both reports of a finished run.

    Returns:
        the HTML file's path.

    Raises:
        UserError: the run has not been judged yet.
    """
    evaluations = folder.read("evaluations.json", {})
    if "final" not in evaluations:
        raise UserError(f"{folder.path} has not been judged yet; the same `distill run` goes on with it")
    target = folder.path / "report.html"
    write_text(target, _page(folder, evaluations))
    write_text(folder.path / "report.md", _markdown(folder, evaluations))
    return target


def headline(judged: dict) -> Table:
    """The table that ends a run, for the terminal."""
    columns, lines = headline_cells(judged)
    table = Table(box=None, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for name, cells in lines.items():
        table.add_row(*cells, style="bold" if name == "student" else "")
    return table


def headline_cells(judged: dict) -> tuple[list[str], dict[str, list[str]]]:
    """Column titles and, by row, cells: every model against the teacher."""
    columns = ["", "held-out KL", "agreement", "perplexity"]
    columns += [f"passkey {entry['length']}" for entry in judged["rows"]["teacher"]["passkey"]]
    lines = {}
    for name, results in judged["rows"].items():
        measured = results["fidelity"]
        error = f" ± {measured['kl_error']:.3f}" if name != "teacher" else ""
        cells = [
            TITLES[name],
            f"{measured['kl']:.3f}{error}",
            f"{measured['agreement']:.1%}",
            f"{measured['perplexity']:.2f}",
        ]
        lines[name] = cells + [f"{entry['recalled']}/{entry['trials']}" for entry in results["passkey"]]
    return columns, lines


def story_cells(folder: RunDir, evaluations: dict) -> tuple[list[str], list[list[str]]]:
    """Column titles and lines of what each stage did on held-out text."""
    columns = ["after", "seconds", "held-out KL", "agreement", "perplexity", "its own held-out loss, before -> after"]
    lines, probe = [], {}
    if "untrained" in evaluations:
        measured = evaluations["untrained"]
        lines.append(["nothing: the windows alone", "", *_fidelity_cells(measured), ""])
    for key, measured in evaluations.get("after", {}).items():
        stage = key.partition("-")[2]
        own = f"{probe[stage]:.4f} -> {measured['probe'][stage]:.4f}" if stage in probe else ""
        lines.append([stage, f"{measured['seconds']:.0f}", *_fidelity_cells(measured), own])
        probe = measured["probe"]
    return columns, lines


def _fidelity_cells(measured: dict) -> list[str]:
    return [f"{measured['kl']:.3f}", f"{measured['agreement']:.1%}", f"{measured['perplexity']:.2f}"]


def _page(folder: RunDir, evaluations: dict) -> str:
    recipe, judged = folder.recipe(), evaluations["final"]
    title = html.escape(recipe.name)
    sections = [
        f"<h1>{title}</h1><p class='note'>{html.escape(recipe.teacher)} distilled into a hybrid. "
        f"KL is in nats a token, on {judged['rows']['student']['fidelity']['tokens']:,} held-out tokens; "
        "± is one standard error over windows.</p>",
        _strip(recipe, judged),
        _section("Student, baselines, teacher", _headline_html(judged)),
        _section("What each stage did", _story_html(folder, evaluations)),
        _section("Training losses", figures.loss_curves(folder.metrics()) if folder.metrics() else ""),
        _section("Layers", _layers_html(evaluations)),
        _section("By position and by source", _breakdown_html(judged)),
        _section("Attention and mixer matrices", _matrices_html(folder)),
        _section("The same prompt, continued", _samples_html(folder)),
        _section("How this was made", _facts_html(folder)),
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>"
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _table(columns: list[str], lines: list[list[str]], marked: int | None = None) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    rows = "".join(
        f"<tr{' class=student' if index == marked else ''}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>"
        for index, line in enumerate(lines)
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{rows}</table></div>"


def _headline_html(judged: dict) -> str:
    columns, lines = headline_cells(judged)
    return _table(columns, list(lines.values()), marked=list(lines).index("student"))


def _story_html(folder: RunDir, evaluations: dict) -> str:
    columns, lines = story_cells(folder, evaluations)
    names = ["untrained" if line[0].startswith("nothing") else line[0] for line in lines]
    twin = evaluations["final"]["rows"].get("twin", {}).get("fidelity", {}).get("kl")
    values = [float(line[2]) for line in lines]
    note = "<p class='note'>The line marks where the windows alone ended after the same training.</p>" if twin else ""
    return _table(columns, lines) + figures.story(names, values, twin) + note


def _strip(recipe, judged: dict) -> str:
    letters = [(letter, "mixer" if letter in recipe.mixers else "") for letter in judged["pattern"]]
    cells = "".join(f"<span class='{kind}'>{letter}</span>" for letter, kind in letters)
    meaning = "; ".join(f"{letter}: {html.escape(str(options))}" for letter, options in recipe.mixers.items())
    return f"<p class='strip'>{cells}</p><p class='note'>{meaning}; A: the teacher's attention</p>"


def _layers_html(evaluations: dict) -> str:
    first = next(iter(evaluations.get("after", {}).values()), {"probe": {}})
    before = {name.split("/")[1]: loss**0.5 for name, loss in first["probe"].items() if name.startswith("align/")}
    return figures.layer_errors(before, evaluations["final"]["layers"]) if before else ""


def _breakdown_html(judged: dict) -> str:
    rows = {name: results["fidelity"] for name, results in judged["rows"].items() if name != "teacher"}
    sources = [entry["name"] for entry in rows["student"]["by_source"]]
    lines = [[TITLES[name], *(f"{entry['kl']:.3f}" for entry in measured["by_source"])] for name, measured in rows.items()]
    table = _table(["KL by source", *sources], lines, marked=list(rows).index("student"))
    return figures.by_position({name: measured["by_position"] for name, measured in rows.items()}) + table


def _matrices_html(folder: RunDir) -> str:
    file = folder.path / "matrices.npz"
    if not file.exists():
        return ""
    arrays = np.load(file)
    names = [name.removesuffix(" attention") for name in arrays.files if name.endswith(" attention")]
    pairs = [
        f"<div class='pair'><p class='note'>{name}</p>"
        f"{figures.matrix_pair(arrays[f'{name} attention'], arrays[f'{name} mixer'])}</div>"
        for name in names
    ]
    return "".join(pairs) + "<p class='note'>Square roots are shown; a mixer's terms are scaled to fit best.</p>"


def _samples_html(folder: RunDir) -> str:
    samples = folder.read("samples.json", {})
    if not samples:
        return ""
    prompt = f"<b>{html.escape(samples['prompt'])}</b>"
    return "".join(
        f"<p class='note'>{name}</p><blockquote>{prompt}{html.escape(samples[name])}</blockquote>"
        for name in ("teacher", "student")
    )


def _facts_html(folder: RunDir) -> str:
    run = folder.read("run.json", {})
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    command = f"distill run {folder.path / 'recipe.yaml'}"
    return (
        f"<p class='note'>Run folder <code>{html.escape(folder.path.name)}</code>; "
        f"the same again: <code>{html.escape(command)}</code>. {html.escape(versions)}. "
        f"Teacher fingerprint {run.get('teacher', '')}, text {run.get('train_text', '')[:12]}.</p>"
    )


def _markdown(folder: RunDir, evaluations: dict) -> str:
    recipe = folder.recipe()
    columns, lines = headline_cells(evaluations["final"])
    story_columns, story_lines = story_cells(folder, evaluations)
    parts = [
        f"# {recipe.name}",
        f"Teacher: `{recipe.teacher}`. KL in nats a token on held-out text, ± one standard error over windows.",
        _markdown_table(columns, list(lines.values())),
        "## What each stage did",
        _markdown_table(story_columns, story_lines),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: list[str], lines: list[list[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
