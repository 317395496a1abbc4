"""How near a model's next-token distribution is to its teacher's on held-out text: KL, agreement, ranks, perplexity.

By position in the window (what a short memory loses grows with it) and by source of text. KL is in nats a token.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor, nn

from distill.evaluation.calibration import calibration_error, rank_agreement
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.rows import rows_table
from distill.output_head import head_of
from distill.text.heldout import Heldout
from distill.text.windows import Batch
from students.kernels.linear_kl import Head
from students.kernels.linear_kl.reference import forward_kl, logits_of
from teachers.teacher import Teacher

CHUNK = 1024  # tokens whose logits exist at a time
POSITION_BANDS = 8
COLUMNS = ("kl", "agree", "nll", "teacher_nll", "rank", "overlap", "kendall")  # means over tokens
SURENESS = ("confidence", "correct", "teacher_confidence", "teacher_correct")  # what calibration is measured from


@torch.no_grad()
def fidelity(teacher: Teacher, model: nn.Module | None, heldout: Heldout) -> dict:
    """Compare a student with its teacher on held-out text; `model` None compares the teacher with itself.

    Returns:
        tokens, kl, kl_error (standard error over windows), agreement, perplexity, teacher_perplexity, ece, teacher_ece
        (see `calibration_error`), rank, overlap, kendall (means of `rank_agreement`), and by_position and by_source, lists
        of {name, tokens, kl, agreement}.
    """
    teacher_head = head_of(teacher.model)
    head = teacher_head if model is None else head_of(model)
    columns: dict[str, list[Tensor]] = {name: [] for name in (*COLUMNS, *SURENESS, "weight", "label")}
    for batch, teacher_hidden in zip(heldout.batches, heldout.hidden, strict=True):
        hidden = teacher_hidden if model is None else model.hidden(batch.ids, batch.documents)
        scored = _score_tokens(hidden, head, teacher_hidden, teacher_head, batch)
        for name, values in {**scored, "weight": batch.weights, "label": batch.labels}.items():
            columns[name].append(values.reshape(batch.ids.shape).cpu())
    table = {name: torch.cat(parts) for name, parts in columns.items()}  # [window t]
    weight = table["weight"]
    window_kl = _mean(table["kl"], weight, 1)
    result = {
        "tokens": int(weight.sum()),
        "kl": _mean(table["kl"], weight).item(),
        "kl_error": (window_kl.std() / len(window_kl) ** 0.5).item() if len(window_kl) > 1 else 0.0,
        "agreement": _mean(table["agree"], weight).item(),
        "perplexity": _mean(table["nll"], weight).exp().item(),
        "teacher_perplexity": _mean(table["teacher_nll"], weight).exp().item(),
        "ece": calibration_error(table["confidence"], table["correct"], weight),
        "teacher_ece": calibration_error(table["teacher_confidence"], table["teacher_correct"], weight),
        **{name: _mean(table[name], weight).item() for name in ("rank", "overlap", "kendall")},
    }
    return {**result, "by_position": _by_position(table), "by_source": _by_source(table, heldout.label_names)}


def _score_tokens(
    hidden: Float[Tensor, "b t d"], head: Head, teacher_hidden: Float[Tensor, "b t e"], teacher_head: Head, batch: Batch
) -> dict[str, Tensor]:
    """Every column of the table, a chunk of logits at a time."""
    rows: dict[str, list[Tensor]] = {name: [] for name in (*COLUMNS, *SURENESS)}
    pieces = zip(
        hidden.flatten(0, 1).split(CHUNK),
        teacher_hidden.flatten(0, 1).split(CHUNK),
        batch.targets.flatten().split(CHUNK),
        strict=True,
    )
    for piece, teacher_piece, targets in pieces:
        student = logits_of(piece, head).log_softmax(-1)
        teacher = logits_of(teacher_piece, teacher_head).log_softmax(-1)
        scored = {"kl": forward_kl(student, teacher), **rank_agreement(student, teacher)}
        choices = []
        for prefix, logprobs in (("", student), ("teacher_", teacher)):
            best, choice = logprobs.max(-1)
            choices.append(choice)
            scored[f"{prefix}nll"] = -logprobs.gather(-1, targets[:, None])[:, 0]
            scored[f"{prefix}confidence"] = best.exp()
            scored[f"{prefix}correct"] = (choice == targets).float()
        scored["agree"] = (choices[0] == choices[1]).float()
        for name, values in scored.items():
            rows[name].append(values)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _mean(values: Tensor, weight: Tensor, dim: int | None = None) -> Tensor:
    total = (values * weight).sum() if dim is None else (values * weight).sum(dim)
    return total / (weight.sum() if dim is None else weight.sum(dim)).clamp_min(1.0)


def _by_position(table: dict[str, Tensor]) -> list[dict]:
    time = table["kl"].shape[1]
    edges = [round(i * time / POSITION_BANDS) for i in range(POSITION_BANDS + 1)]
    bands = [(f"{a}-{b - 1}", slice(a, b)) for a, b in itertools.pairwise(edges) if b > a]
    return [_line(name, {key: column[:, band] for key, column in table.items()}) for name, band in bands]


def _by_source(table: dict[str, Tensor], names: Sequence[str]) -> list[dict]:
    rows = []
    for index in table["label"].unique().tolist():
        chosen = {**table, "weight": table["weight"] * (table["label"] == index)}
        if chosen["weight"].sum() > 0:
            rows.append(_line(names[index], chosen))
    return rows


def _line(name: str, table: dict[str, Tensor]) -> dict:
    weight = table["weight"]
    return {
        "name": name,
        "tokens": int(weight.sum()),
        "kl": _mean(table["kl"], weight).item(),
        "agreement": _mean(table["agree"], weight).item(),
    }


class Fidelity(Evaluation):
    """Fidelity to the teacher, of every row."""

    suites = baselines = ("run", "quick", "standard", "full")

    def measure(self, teacher, model, heldout, suite):
        return fidelity(teacher, model, heldout)

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        yield "fidelity on held-out text, KL in nats a token", _table(judged["rows"])


def _table(rows: Mapping) -> Table:
    lines = {}
    for row, results in rows.items():
        found = results["fidelity"]
        lines[row] = [
            f"{found['kl']:.3f}" + (f"±{found['kl_error']:.3f}" if row != "teacher" else ""),
            f"{found['agreement']:.1%}",
            f"{found['perplexity']:.2f}",
            f"{found['ece']:.3f}",
            f"{found['rank']:.1f}",
            f"{found['overlap']:.1%}",
            f"{found['kendall']:.3f}",
        ]
    return rows_table(["", "KL", "agree", "perplexity", "ECE", "rank", "top 5", "tau of 10"], lines)
