"""Recall tests: families of made-up texts, each with a question about a fact in it. Averages over text hide such recall.

All families are scored in the same way. The sequence contains the answers, and one forward pass reads it. An answer counts
if each of its tokens is the most likely one in the whole vocabulary given everything before it, so that greedy decoding
would generate it. A score is the share of answers that count, so chance is 0. If a sequence has several answers, each is
scored given the right ones before it. Texts are made with the teacher's tokenizer and a fixed seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from distill.evaluation.comparison import shares
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.recall.families import FAMILIES, GRIDS, make, title
from distill.evaluation.recall.item import Tokens
from distill.evaluation.rows import rows_table
from distill.evaluation.scoring import score
from distill.evaluation.suite import Suite
from distill.text.heldout import Heldout
from students.skeleton import Student
from teachers.teacher import Teacher


class Passkey(Evaluation):
    """The evaluation of passkey recall by length, for every row."""

    suites = baselines = knockouts = ("run", "quick", "standard", "full")

    def measure(self, teacher: Teacher, model: Student | None, heldout: Heldout, suite: Suite) -> list[dict]:
        """Return a list of {length, recalled, trials}."""
        cells = recall(teacher, model, "passkey", suite.passkey, suite.passkey_trials)
        return [{name: cell[name] for name in ("length", "recalled", "trials")} for cell in cells]

    def beside(self, own: Any, teacher: Any) -> dict[str, Any]:
        return {"passkey": shares(own, teacher)}

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        selected = "; in-sample: passkeys selected the layout" if "passkey" in in_sample(judged) else ""
        yield f"passkeys recalled, by length (share of the teacher's){selected}", _passkey_table(judged)


class Recall(Evaluation):
    """The evaluation of every other family, by length, and by depth if the family is a grid."""

    suites = baselines = knockouts = ("standard", "full")

    def measure(
        self, teacher: Teacher, model: Student | None, heldout: Heldout | None, suite: Suite
    ) -> dict[str, list[dict]]:
        return row(teacher, model, heldout, suite)

    def beside(self, own: Any, teacher: Any) -> dict[str, Any]:
        return {"recall": {family: shares(cells, teacher[family]) for family, cells in own.items()}}

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        families = judged["rows"]["teacher"]["recall"].values()
        for length in sorted({cell["length"] for cells in families for cell in cells}):
            yield f"recall at {length} tokens, % of answers", _recall_table(judged, length)


def recall(
    teacher: Teacher, model: nn.Module | None, family: str, lengths: Sequence[int], trials: int, depths: Sequence[float] = ()
) -> list[dict]:
    """Score a family. model: None scores the teacher.

    Args:
        trials: sequences for each length, or for each length and depth. depths: of a grid; none for one cell a length.

    Returns:
        a list of {length, depth (grids only), recalled, trials, score}: answers that count, answers, and their ratio.
    """
    tokens, cells = Tokens(cast(PreTrainedTokenizerBase, teacher.tokenizer)), []
    for length in lengths:
        if depths:
            texts = make(tokens, family, length, trials, [depth for depth in depths for _ in range(trials)])
        else:
            texts = make(tokens, family, length, trials)
        answers = [[answer.greedy for answer in found] for found in score(teacher, model, texts)]
        for index, depth in enumerate(depths or [None]):
            said = [one for found in answers[index * trials : (index + 1) * trials] for one in found]
            place = {"length": length} if depth is None else {"length": length, "depth": depth}
            cells.append({**place, "recalled": sum(said), "trials": len(said), "score": sum(said) / len(said)})
    return cells


def passkey_lengths(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> dict[int, int]:
    """Return the tokens that a passkey text of each length takes: more than the length if its smallest form is longer."""
    tokens = Tokens(tokenizer)
    return {length: max(len(marked.ids) for marked in make(tokens, "passkey", length, 4)) for length in lengths}


def row(teacher: Teacher, model: Student | None, heldout: Heldout | None, suite: Suite) -> dict[str, list[dict]]:
    """Score every family but the passkey: {family: cells}."""
    found = {}
    for family in FAMILIES:
        if family in GRIDS:
            found[family] = recall(teacher, model, family, suite.recall, suite.grid_trials, suite.depths)
        elif family != "passkey":
            found[family] = recall(teacher, model, family, suite.recall, suite.recall_trials)
    return found


def _passkey_table(judged: Mapping) -> Table:
    lines = {}
    for row, results in judged["rows"].items():
        parts = [cell["share"] for cell in judged["against_teacher"].get(row, {}).get("passkey", [])]
        parts = parts or [None] * len(results["passkey"])
        lines[row] = [
            f"{cell['recalled']}/{cell['trials']}" + ("" if share is None else f" ({share:.0%})")
            for cell, share in zip(results["passkey"], parts, strict=True)
        ]
    return rows_table(["", *(str(cell["length"]) for cell in judged["rows"]["teacher"]["passkey"])], lines)


def in_sample(judged: Mapping) -> list[str]:
    """Return the families that selected the student's layout, on other items."""
    return judged.get("in_sample", {}).get("families", [])


def _recall_table(judged: Mapping, length: int) -> Table:
    rows, selected = judged["rows"], in_sample(judged)
    families = list(rows["teacher"]["recall"])
    lines = {}
    for row, results in rows.items():
        if "recall" in results:
            cells = [[cell for cell in results["recall"][family] if cell["length"] == length] for family in families]
            lines[row] = [
                f"{sum(cell['recalled'] for cell in found) / sum(cell['trials'] for cell in found):.0%}" for found in cells
            ]
    columns = [title(family) + " (in-sample)" * (family in selected) for family in families]
    return rows_table(["", *columns], lines)
