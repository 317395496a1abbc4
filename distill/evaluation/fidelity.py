"""Fidelity: how near a model's next-token distribution is to its teacher's on held-out text (KL, agreement, perplexity).

Results are also given by position in the window, because the loss of a short memory grows with it, and by source of text. KL
is in nats a token.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.division import divided_tables
from distill.errors import UserError
from distill.evaluation.calibration import calibration_error, rank_agreement
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.nonfinite import NotFinite, blame_logits, check_finite
from distill.evaluation.pairing import COMPARED, mean_and_error
from distill.evaluation.rows import completion_cells, decimal, difference_of, error_of, lower_on, rows_table
from distill.evaluation.suite import Suite
from distill.output_head import wide_head, wide_logits
from distill.text.heldout import Heldout
from distill.text.windows import Batch
from students.kernels.linear_kl import Head
from students.kernels.linear_kl.reference import forward_kl
from students.skeleton import Student
from teachers.teacher import Teacher

CHUNK = 1024  # tokens whose logits exist at a time
POSITION_BANDS = 8
COLUMNS = ("kl", "agreement", "nll", "teacher_nll", "rank", "overlap", "kendall")  # means over tokens
SURENESS = ("confidence", "correct", "teacher_confidence", "teacher_correct")  # the inputs of calibration
MOST_NATS = 690.0  # a token; beyond, the perplexity is not a finite number


@torch.no_grad()
def fidelity(teacher: Teacher, model: Student | None, heldout: Heldout) -> dict:
    """Compare a student with its teacher on held-out text; `model` None compares the teacher with itself.

    Heads and softmaxes are computed in float32, sums in float64; the rest of a model runs in the caller's precision. If
    several processes share the work, each scores its share of the batches.

    Returns:
        tokens, kl, kl_error (standard error over documents; None for a single one), agreement, nll and teacher_nll (nats a
        token), perplexity and teacher_perplexity (None if they are beyond 1e300), ece, teacher_ece (see
        `calibration_error`), rank, overlap, kendall (means of `rank_agreement`), documents, a mapping of lists {number,
        tokens, kl, nll, agreement}, and by_position and by_source, lists of {name, tokens, kl, agreement}; for text with
        chats also completions, see `completions`.

    Raises:
        UserError: no token of the text can be scored. NotFinite: an output is not finite, naming the layer.
    """
    teacher_head = wide_head(teacher.model)
    head = None if model is None else wide_head(model)

    def scores(index: int) -> Float[Tensor, "column _ t"]:
        batch, teacher_hidden = heldout.batches[index], heldout.hidden[index]
        hidden = None if model is None else model.hidden(batch.ids, batch.documents)
        check_finite(teacher, model, hidden, teacher_hidden, batch)
        scored = _score_tokens(hidden, head, teacher_hidden, teacher_head, batch)
        if not all(values.isfinite().all() for values in scored.values()):
            raise NotFinite(blame_logits(teacher, model, teacher_hidden))
        return torch.stack([scored[name].reshape(batch.ids.shape).double() for name in (*COLUMNS, *SURENESS)])

    def shape(index: int) -> tuple[int, ...]:
        return len(COLUMNS) + len(SURENESS), *heldout.batches[index].ids.shape

    indexes = [index for index, batch in enumerate(heldout.batches) if batch.weights.any()]
    if not indexes:
        raise UserError("the held-out text has no token to score: no token has a next one in its document (data.heldout)")
    columns = torch.cat(divided_tables(indexes, scores, shape, teacher.device), 1)  # [column window t]
    table = dict(zip((*COLUMNS, *SURENESS), columns, strict=True)) | _places(heldout, indexes)
    found = _summary(table, heldout.label_names)
    batches = [heldout.batches[index] for index in indexes]
    if any(batch.trained is not None and batch.trained.any() for batch in batches):
        found["completions"] = completions(table, batches, cast(PreTrainedTokenizerBase, teacher.tokenizer))
    return found


def completions(table: Mapping[str, Tensor], batches: Sequence[Batch], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return the fidelity on completions: the assistant's tokens in chats, and every token of other text.

    Args:
        table: columns over all tokens, [window t]. batches: must have `trained`. tokenizer: decodes their tokens.

    Returns:
        tokens, bytes (of UTF-8; tokens that end a turn have none), kl, kl_error (over documents), agreement, nll and
        teacher_nll (nats a token), bits_per_byte and teacher_bits_per_byte (None if there is no byte).
    """
    weight = torch.cat([cast(Tensor, batch.trained).double().cpu() for batch in batches])
    documents = _by_document({**table, "weight": weight})
    means = {name: _mean(table[name], weight).item() for name in ("kl", "agreement", "nll", "teacher_nll")}
    count = sum(answer_bytes(batch, tokenizer) for batch in batches)
    bits = {
        f"{whose}bits_per_byte": means[f"{whose}nll"] * weight.sum().item() / math.log(2) / count if count else None
        for whose in ("", "teacher_")
    }
    error = mean_and_error(documents["kl"], documents["tokens"])[1]
    return {"tokens": int(weight.sum()), "bytes": count, "kl_error": error, **means, **bits}


def answer_bytes(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of UTF-8 bytes of the tokens that a batch's `trained` marks."""
    total = 0
    for targets, marks, documents in zip(
        batch.targets.cpu(), cast(Tensor, batch.trained).cpu() > 0, batch.documents.cpu(), strict=True
    ):
        runs = torch.unique_consecutive(torch.stack([marks.long(), documents]), dim=1, return_counts=True)[1].tolist()
        for ids, marked in zip(targets.split(runs), marks.split(runs), strict=True):
            if marked[0]:
                said = tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
                total += len(cast(str, said).encode())
    return total


def _places(heldout: Heldout, indexes: Sequence[int]) -> dict[str, Tensor]:
    """Return weight, label and document of every token of some batches, [window t]."""
    batches = [heldout.batches[index] for index in indexes]
    documents = [
        torch.zeros_like(batch.ids) if heldout.documents is None else heldout.documents[index]
        for index, batch in zip(indexes, batches, strict=True)
    ]
    parts = {
        "weight": [batch.weights.double() for batch in batches],
        "label": [batch.labels for batch in batches],
        "document": documents,
    }
    return {
        name: torch.cat([part.reshape(batch.ids.shape).cpu() for part, batch in zip(found, batches, strict=True)])
        for name, found in parts.items()
    }


def _summary(table: dict[str, Tensor], label_names: Sequence[str]) -> dict:
    weight, documents = table["weight"], _by_document(table)
    means = {name: _mean(table[name], weight).item() for name in COLUMNS}
    return {
        "tokens": int(weight.sum()),
        "kl": means["kl"],
        "kl_error": mean_and_error(documents["kl"], documents["tokens"])[1],
        "agreement": means["agreement"],
        "nll": means["nll"],
        "teacher_nll": means["teacher_nll"],
        "perplexity": perplexity(means["nll"]),
        "teacher_perplexity": perplexity(means["teacher_nll"]),
        "ece": calibration_error(table["confidence"], table["correct"], weight),
        "teacher_ece": calibration_error(table["teacher_confidence"], table["teacher_correct"], weight),
        **{name: means[name] for name in ("rank", "overlap", "kendall")},
        "documents": documents,
        "by_position": _by_position(table),
        "by_source": _by_source(table, label_names),
    }


def perplexity(nll: float) -> float | None:
    """Return exp of nats a token; None if that is beyond 1e300."""
    return math.exp(nll) if nll < MOST_NATS else None


def _score_tokens(
    hidden: Float[Tensor, "b t d"] | None,
    head: Head | None,
    teacher_hidden: Float[Tensor, "b t e"],
    teacher_head: Head,
    batch: Batch,
) -> dict[str, Tensor]:
    """Return every column of the table, one chunk of logits at a time. hidden: None compares the teacher with itself."""
    rows: dict[str, list[Tensor]] = {name: [] for name in (*COLUMNS, *SURENESS)}
    theirs = teacher_hidden.flatten(0, 1).split(CHUNK)
    ours = [None] * len(theirs) if hidden is None else hidden.flatten(0, 1).split(CHUNK)
    for piece, teacher_piece, targets in zip(ours, theirs, batch.targets.flatten().split(CHUNK), strict=True):
        teacher = wide_logits(teacher_piece, teacher_head).log_softmax(-1)
        student = teacher if piece is None else wide_logits(piece, cast(Head, head)).log_softmax(-1)
        scored = {"kl": forward_kl(student, teacher), **rank_agreement(student, teacher)}
        choices = []
        for prefix, logprobs in (("", student), ("teacher_", teacher)):
            best, choice = logprobs.max(-1)
            choices.append(choice)
            scored[f"{prefix}nll"] = -logprobs.gather(-1, targets[:, None])[:, 0]
            scored[f"{prefix}confidence"] = best.exp()
            scored[f"{prefix}correct"] = (choice == targets).float()
        scored["agreement"] = (choices[0] == choices[1]).float()
        for name, values in scored.items():
            rows[name].append(values)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()


def _by_document(table: dict[str, Tensor]) -> dict[str, list]:
    """Return means over each document's tokens, in the documents' order."""
    chosen = table["weight"] > 0
    numbers, place = table["document"][chosen].unique(return_inverse=True)
    weight = table["weight"][chosen]
    total = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, place, weight)
    found: dict[str, list] = {"number": numbers.tolist(), "tokens": [int(count) for count in total]}
    for name in COMPARED:
        sums = torch.zeros_like(total).index_add_(0, place, table[name][chosen] * weight)
        found[name] = (sums / total).tolist()
    return found


def _by_position(table: dict[str, Tensor]) -> list[dict]:
    time = table["kl"].shape[1]
    edges = [round(i * time / POSITION_BANDS) for i in range(POSITION_BANDS + 1)]
    bands = [(f"{a}-{b - 1}", slice(a, b)) for a, b in itertools.pairwise(edges) if b > a]
    lines = [_line(name, {key: column[:, band] for key, column in table.items()}) for name, band in bands]
    return [line for line in lines if line is not None]


def _by_source(table: dict[str, Tensor], names: Sequence[str]) -> list[dict]:
    lines = [
        _line(names[index], {**table, "weight": table["weight"] * (table["label"] == index)})
        for index in table["label"].unique().tolist()
    ]
    return [line for line in lines if line is not None]


def _line(name: str, table: dict[str, Tensor]) -> dict | None:
    """Return a part's means; None if no token in it counts."""
    weight = table["weight"]
    if not weight.any():
        return None
    means = {key: _mean(table[key], weight).item() for key in ("kl", "agreement")}
    return {"name": name, "tokens": int(weight.sum()), **means}


class Fidelity(Evaluation):
    """The evaluation of fidelity to the teacher, for every row."""

    suites = baselines = knockouts = ("run", "quick", "standard", "full")

    def measure(self, teacher: Teacher, model: Student | None, heldout: Heldout, suite: Suite) -> dict:
        return fidelity(teacher, model, heldout)

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        count = len(judged["rows"]["student"]["fidelity"].get("documents", {}).get("number", []))
        of = f" of {count} documents, ± one standard error over them" if count else ""
        yield f"fidelity on held-out text{of}, KL in nats a token", _table(judged["rows"])
        if any(results["fidelity"].get("completions") for results in judged["rows"].values()):
            yield "fidelity on what the assistant said, KL in nats a token", _completions_table(judged["rows"])
        if any(judged.get("against_student", {}).values()):
            yield "the student less each row, paired document by document", _paired_table(judged["against_student"])


def _table(rows: Mapping) -> Table:
    lines = {}
    for row, results in rows.items():
        found = results["fidelity"]
        lines[row] = [
            f"{found['kl']:.3f}" + error_of(found["kl_error"] if row != "teacher" else None, 3, "±"),
            f"{found['agreement']:.1%}",
            decimal(found["perplexity"], 2),
            f"{found['ece']:.3f}",
            f"{found['rank']:.1f}",
            f"{found['overlap']:.1%}",
            f"{found['kendall']:.3f}",
        ]
    return rows_table(["", "KL", "agree", "perplexity", "ECE", "rank", "top 5", "tau of 10"], lines)


def _completions_table(rows: Mapping) -> Table:
    titles = ["", "KL", "agree", "nats a token", "bits a byte", "tokens"]
    lines = {}
    for row, results in rows.items():
        if found := results["fidelity"].get("completions"):
            _, agreement, bits = completion_cells(found)
            kl = f"{found['kl']:.3f}" + error_of(found["kl_error"] if row != "teacher" else None, 3, "±")
            lines[row] = [kl, agreement, f"{found['nll']:.3f}", bits, f"{found['tokens']:,}"]
    return rows_table(titles, lines)


def _paired_table(against: Mapping) -> Table:
    lines = {}
    for row, found in against.items():
        if found:
            kl = [] if row == "teacher" else [difference_of(found["kl"], 4), lower_on(found["kl"])]
            both = [*(kl or ["", ""]), difference_of(found["nll"], 4), lower_on(found["nll"])]
            lines[row] = [*both, difference_of(found["agreement"], 3)]
    return rows_table(["", "KL", "lower on", "nats a token", "lower on", "agree"], lines)
