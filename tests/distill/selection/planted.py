"""The sizes of the planted teacher, options of small selections, and calls of `select`."""

import yaml

from distill import select
from distill.recipe_file import check
from distill.runs.session import Session
from distill.selection import SCORERS
from distill.selection.checking import selection_options

LAYERS, HEADS, LAYER, HEAD = 4, 2, 2, 1  # of the planted teacher; where the one head is
SMALL = {"window": 8, "sinks": 1, "families": ["passkey"], "length": 128, "trials": 3, "tokens": 256}
SMALLER = {
    "task": {"names": ["piqa"], "items": 6},
    "greedy": {"beam": 2, "look_ahead": 2},
    "gates": {"training_tokens": 2000, "lr": 0.3},
}
# Every scorer but the one that measures nothing and the one that ranks heads.
MEASURED = {by: SMALLER.get(by, {}) for by in SCORERS if by not in ("uniform", "retrieval-heads")}


def written(tmp_path, entries):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def chosen_by(entries, tmp_path, **options):
    entries["pattern"] |= options
    tmp_path.mkdir(exist_ok=True)
    return select(written(tmp_path, entries), runs=tmp_path / "runs")


def opened(entries):
    recipe = check(entries, "mine.yaml")
    session = Session.open(recipe)
    return session, selection_options(recipe)
