"""`distill bench layouts`: trains every layout on one recipe's layers, text and budget, and compares the students.

The recipe says which layers keep their attention (its letter A); a layout says what the others become. Every layout has the
quickstart's window length, so that rows differ in the mixer alone. Rows are written as they are finished, and a second call
measures only what is missing.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.errors import UserError, nearest
from distill.evaluation.recall import recall
from distill.evaluation.rows import decimal, error_of
from distill.evaluation.stored import evaluations_of
from distill.evaluation.suites import suite_of_run
from distill.recipe import Recipe
from distill.recipe_file import check
from distill.runs.run_dir import RunDir, versions
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages import stages_of
from distill.training.pipeline import Pipeline
from students.config import KEEP
from students.state_size import state_bytes

NEAR = {"window": 64, "sinks": 4}
WINDOW = {"mixer": "attention", **NEAR}
BESIDE = {"size": 64, "sinks": 4, "own": True, "gate": True}
# By name: the letters that repeat over the converted layers, their mixers, and the number of meta tokens.
LAYOUTS: dict[str, tuple[str, dict[str, dict[str, Any]], int]] = {
    "windows alone": ("W", {"W": WINDOW}, 0),
    "discrete Mamba-2 behind windows": ("M", {"M": {"mixer": "discrete_mamba2", "window": BESIDE | {"lag": True}}}, 0),
    "discrete Mamba-2 (Phi-Mamba, Llamba)": ("M", {"M": {"mixer": "discrete_mamba2"}}, 0),
    "Mamba-2": ("M", {"M": {"mixer": "mamba2"}}, 0),
    "Mamba": ("M", {"M": {"mixer": "mamba1"}}, 0),
    "Samba": ("MW", {"M": {"mixer": "mamba1"}, "W": WINDOW}, 0),
    "Zamba": ("MMMMSM", {"M": {"mixer": "mamba2"}, "S": {"mixer": "shared_attention", "rank": 64}}, 0),
    "Hymba": ("P", {"P": {"mixer": "parallel_heads", **NEAR, "ssm": {"mixer": "discrete_mamba2", "d_state": 16}}}, 4),
    "Griffin": ("RRW", {"R": {"mixer": "rg_lru"}, "W": WINDOW}, 0),
    "split heads": ("H", {"H": {"mixer": "split_heads", "keep": [0], "ssm": {"mixer": "discrete_mamba2"}}}, 0),
    "gated DeltaNet": ("M", {"M": {"mixer": "gated_deltanet"}}, 0),
    "GLA": ("M", {"M": {"mixer": "gla"}}, 0),
    "RetNet": ("M", {"M": {"mixer": "retention"}}, 0),
    "lightning": ("M", {"M": {"mixer": "retention", "decay": "lightning"}}, 0),
    "Longhorn": ("M", {"M": {"mixer": "longhorn"}}, 0),
    "Taipan": ("M", {"M": {"mixer": "mamba2", "window": {"size": 64, "sinks": 4, "lag": False, "gate": "select"}}}, 0),
    "B'MOJO-F": ("M", {"M": {"mixer": "mamba2", "window": {"size": 64, "sinks": 0}}}, 0),
}
RECIPE = "quickstart"  # the default
LONG = 32_768  # tokens at which the cache's size is computed


def run(recipe: Recipe, names: Sequence[str] = (), *, runs: str | Path = "runs") -> dict:
    """Train and judge layouts.

    Args:
        recipe: every layout gets its layers, text and budget. names: of LAYOUTS; all by default. runs: where run folders
            are made; those of the layouts, with their rows, are in its folder `layouts`.

    Returns:
        recipe, versions and one row for each layout: see `measure`.

    Raises:
        UserError: an unknown layout, or what a run refuses.
    """
    for name in names:
        if name not in LAYOUTS:
            raise UserError(f"there is no layout {name!r}; {nearest(name, LAYOUTS)}")
    rows = []
    for name in names or LAYOUTS:
        folder = Path(runs) / "layouts" / name.replace(" ", "-").replace("'", "")
        rows.append({"layout": name} | measure(of_layout(recipe, name), folder))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"recipe": recipe.name, "versions": versions(), "rows": rows}


def of_layout(base: Recipe, name: str) -> Recipe:
    """The recipe with another layout in the layers that it converts."""
    letters, mixers, meta_tokens = LAYOUTS[name]
    taken, pattern = itertools.cycle(letters), ""
    while not set(letters) <= set(pattern):  # a short pattern repeats until all are in
        pattern += "".join(KEEP if letter == KEEP else next(taken) for letter in base.pattern)
    kept = [base.stages[entry.index] for entry in stages_of(base) if not entry.kind.changes_layout]
    layout = {"pattern": pattern, "mixers": mixers, "meta_tokens": meta_tokens, "stages": kept}
    entries = base.model_dump(mode="json") | layout
    return check(entries | {"twin": False, "export": []}, f"{base.name}, {name}")


def measure(recipe: Recipe, path: Path) -> dict:
    """Train one student and judge it after its last stage.

    Returns:
        device; held-out kl, kl_error, agreement and perplexity; passkey {length: "recalled/trials"}; bytes of the cache at
        32k tokens in bf16; tokens_per_second of each stage that trains; seconds.
    """
    if known := RunDir(path).read("row.json"):
        return known
    began = time.monotonic()
    session = Session.open(recipe)
    folder = RunDir.at(path, recipe, fresh=False)
    pipeline = Pipeline(session, folder, Console(quiet=True), Stopper(), every_stage=False)
    heldout = session.heldout(*suite_of_run(recipe.evaluation).text(recipe.evaluation, session.heldout_windows.seq_len))
    pipeline.run(heldout)
    student, options = pipeline.student, recipe.evaluation
    with session.accelerator.autocast():
        cells = recall(session.teacher, student, "passkey", options.passkey, options.passkey_trials)
    found = list(evaluations_of(folder).get("after", {"": {}}).values())[-1]  # the pipeline judged the last stage
    if "kl" not in found:
        raise UserError(f"{path}: the last stage's KL is missing or not finite; delete the folder to train again")
    row = {
        "device": str(session.accelerator.device), "pattern": student.layout.pattern,
        "kl": found["kl"], "kl_error": found["kl_error"], "agreement": found["agreement"], "perplexity": found["perplexity"],
        "passkey": {cell["length"]: f"{cell['recalled']}/{cell['trials']}" for cell in cells},
        "cache_bytes": state_bytes(student, LONG), "tokens_per_second": dict(_rates(folder.metrics())),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    folder.write("row.json", row)
    return row


def _rates(metrics: Sequence[Mapping]) -> Iterator[tuple[str, int]]:
    """Each stage's median tokens a second, without the first step where there are more."""
    for stage in dict.fromkeys(line["stage"] for line in metrics):
        rates = [line["tokens_per_second"] for line in metrics if line["stage"] == stage]
        rates = sorted(rates[1:] or rates)
        yield stage, round(rates[len(rates) // 2])


def all_right(result: Mapping) -> bool:
    """Whether every layout was trained."""
    return bool(result["rows"])


def table(result: Mapping) -> Table:
    """What `run` returned, as a table."""
    found = Table(title=f"layouts on {result['recipe']}", box=None)
    for name in ("layout", "KL", "agreement", "perplexity", "passkey", "MiB at 32k", "tokens/s"):
        found.add_column(name, justify="left" if name == "layout" else "right")
    for row in sorted(result["rows"], key=lambda row: row["kl"]):
        passkey = " ".join(row["passkey"].values())
        speed = " / ".join(f"{rate:,}" for rate in row["tokens_per_second"].values())
        numbers = f"{row['kl']:.3f}{error_of(row['kl_error'], 3)}", f"{row['agreement']:.1%}", decimal(row["perplexity"], 2)
        found.add_row(row["layout"], *numbers, passkey, f"{row['cache_bytes'] / 2**20:.1f}", speed)
    return found
