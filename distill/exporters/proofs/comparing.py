"""The comparison of two answers: the numbers of a proof, or the first difference beyond its bounds."""

from typing import cast

import numpy

from distill.errors import UserError
from distill.exporters.proofs.answer import Answer
from distill.exporters.proofs.asked import Asked
from distill.exporters.proofs.bounds import SCALE, Bounds


def compare(found: Answer, wanted: Answer, asked: Asked, bounds: Bounds) -> dict[str, float | int | str]:
    """Return an engine's numbers: differences of logits and log-probabilities, divergence, perplexity, equal tokens.

    Raises:
        UserError: a number that is not finite, or a difference beyond its bound, with the place and both values.
    """
    numbers: dict[str, float | int | str] = {}
    _check_finite(found)
    if bounds.logits is not None:
        numbers["logits"] = _logits(found, wanted, asked, bounds.logits)
    if bounds.logprobs is not None:
        numbers["log-probabilities"] = _logprobs(found, wanted, bounds.logprobs)
    if len(found.rows):
        numbers |= divergence(found, wanted)
        _divergence(numbers, found, wanted, bounds)
    numbers["perplexity"] = round(found.perplexity, 6)
    if bounds.perplexity is not None:
        _perplexity(found, wanted, bounds.perplexity)
        numbers["perplexity, against that of the student"] = f"x {found.perplexity / wanted.perplexity:.4f}"
    if found.tokens or found.own:
        numbers |= _tokens(found, wanted, asked, bounds.tie)
    return numbers


def check_ways(found: Answer, bounds: Bounds) -> dict[str, float]:
    """Return the differences between ways of computing the same thing in one engine.

    Raises:
        UserError: a difference is beyond its bound.
    """
    numbers = {}
    for name, check in found.checks.items():
        if check is None:
            continue
        away, text, position, value, wanted = check
        if not away <= _scaled(cast(float, bounds.ways), value, wanted):
            raise UserError(
                f"{found.name}: {name} differs from the whole text alone: {_where(text, position)}: {value:.6g} "
                f"instead of {wanted:.6g}"
            )
        numbers[name] = away
    return numbers


def compare_ids(found: Answer, asked: Asked) -> None:
    """Compare an engine's own tokenizer with the student's.

    Raises:
        UserError: the first token that differs, with the start of the text.
    """
    for string, ids in zip(asked.strings, found.ids, strict=True):
        wanted = asked.strings[string]
        if ids != wanted:
            place = next((n for n, pair in enumerate(zip(ids, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
            raise UserError(
                f"{found.name} splits {string[:40]!r}... into {len(ids)} tokens, the student's tokenizer into "
                f"{len(wanted)}; token {place + 1} is {ids[place : place + 1]} instead of {wanted[place : place + 1]}"
            )


def divergence(found: Answer, wanted: Answer) -> dict[str, float]:
    """Return the mean KL of `found` from `wanted` in nats a token, and the top-1 agreement.

    They are taken over the rows that both have, which are those of the first texts.
    """
    rows = min(len(found.rows), len(wanted.rows))
    right, other = wanted.log_rows()[:rows], found.log_rows()[:rows]
    kl = float((numpy.exp(right) * (right - other)).sum(-1).mean())
    return {"kl": kl, "top-1 agreement": float((right.argmax(-1) == other.argmax(-1)).mean())}


def rounding(found: Answer, wanted: Answer) -> dict[str, float]:
    """Return the largest difference of log-probabilities, between two answers that differ only by rounding."""
    away = max(float(numpy.abs(one - other).max()) for one, other in zip(found.logprobs, wanted.logprobs, strict=True))
    return {"log-probabilities, rounded to float32": away}


def _check_finite(found: Answer) -> None:
    for number, logs in enumerate(found.logprobs):
        if not numpy.isfinite(logs).all():
            position = int(numpy.argmin(numpy.isfinite(logs))) + 1
            raise UserError(f"{found.name}: {_where(number, position)}: the log-probability is {logs[position - 1]}")


def _logits(found: Answer, wanted: Answer, asked: Asked, bound: float) -> float:
    """Return the largest difference of logits. Raises UserError beyond the bound."""
    worst, places = 0.0, [(text, row) for text, rows in enumerate(asked.rows) for row in rows]
    for place, one, other in zip(places, found.rows, wanted.rows, strict=True):
        away = numpy.abs(one.astype(numpy.float64) - other)
        token = int(numpy.argmax(numpy.where(numpy.isnan(away), numpy.inf, away)))
        if not away[token] <= _scaled(bound, *map(float, (numpy.abs(one).max(), numpy.abs(other).max()))):
            raise UserError(
                f"{found.name}: {_where(*place)}: the logit of token {token} is {one[token]:.6g}, but {wanted.name} gives "
                f"{other[token]:.6g}"
            )
        worst = max(worst, float(away[token]))
    return worst


def _logprobs(found: Answer, wanted: Answer, bound: float) -> float:
    """Return the largest difference of log-probabilities. Raises UserError beyond the bound."""
    worst = 0.0
    for text, (one, other) in enumerate(zip(found.logprobs, wanted.logprobs, strict=True)):
        away = numpy.abs(one - other)
        place = int(away.argmax())
        if away[place] > bound:
            raise UserError(
                f"{found.name}: {_where(text, place + 1)}: the log-probability of its token is {one[place]:.6g}, but "
                f"{wanted.name} gives {other[place]:.6g} (bound {bound:g})"
            )
        worst = max(worst, float(away[place]))
    return worst


def _divergence(numbers: dict, found: Answer, wanted: Answer, bounds: Bounds) -> None:
    """Check divergence and agreement. Raises UserError beyond their bounds."""
    if bounds.kl is not None and not numbers["kl"] <= bounds.kl:
        raise UserError(
            f"{found.name}: the divergence from {wanted.name} is {numbers['kl']:.4g} nats a token; at most {bounds.kl:g}"
        )
    if bounds.agreement is not None and not numbers["top-1 agreement"] >= bounds.agreement:
        raise UserError(
            f"{found.name}: the most likely token is that of {wanted.name} in {numbers['top-1 agreement']:.1%} of "
            f"positions; at least {bounds.agreement:.0%}"
        )


def _perplexity(found: Answer, wanted: Answer, bound: float) -> None:
    """Check the perplexity. Raises UserError beyond the bound."""
    if not abs(found.perplexity / wanted.perplexity - 1) <= bound:
        raise UserError(
            f"{found.name}: the perplexity of the text is {found.perplexity:.5g}, but that of {wanted.name} is "
            f"{wanted.perplexity:.5g}; they may differ by {bound:.1%}"
        )


def _tokens(found: Answer, wanted: Answer, asked: Asked, tie: float | None) -> dict[str, str | int]:
    """Compare greedy tokens, each given the same tokens before it, and count the equal ones.

    A token may differ only where the reference's two most likely logits are closer than `tie`; it must then be the second.

    Raises:
        UserError: a token differs elsewhere.
    """
    same = ties = whole = 0
    for prompt, choices in enumerate(found.own or found.tokens):
        for step, token in enumerate(choices):
            expected, second, margin = (part[prompt][step] for part in (wanted.own, wanted.second, wanted.margins))
            whole += 1
            if token == expected:
                same += 1
            elif tie is None or (token == second and margin < tie):
                ties += 1
            else:
                raise UserError(
                    f"{found.name}: prompt {prompt + 1} of {len(asked.prompts[prompt])} tokens: token {step + 1} after it "
                    f"is {token}, but {wanted.name} gives {expected} (its second, {second}, has a logit {margin:.4g} lower)"
                )
    numbers = {"tokens": f"{same} of {whole}"}
    return numbers | ({"near ties": ties} if tie is not None else {})


def _scaled(bound: float, *logits: float) -> float:
    return bound * max(1.0, *(abs(logit) / SCALE for logit in logits))


def _where(text: int, position: int) -> str:
    return f"prompt {text + 1}, position {position}"
