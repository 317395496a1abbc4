"""Means over documents with the error that documents have, and the difference of two models on the same ones.

Tokens of one document go together, so an error counts documents, not tokens. Two rows of a table read the same documents,
and most of what makes one of these hard makes it hard for both: their difference has a smaller error than either.
"""

from collections.abc import Mapping, Sequence

import numpy as np

COMPARED = {"kl": "lower", "nll": "lower", "agreement": "higher"}  # what is better


def mean_and_error(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """The weighted mean over documents, and its standard error.

    The error is that of a ratio estimator: of documents alike in weight, their standard deviation over the root of their
    number; None of a single document.

    Args:
        values: of each document. weights: tokens of each.
    """
    value, weight = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    mean = float((value * weight).sum() / weight.sum())
    count = len(value)
    if count < 2:
        return mean, None
    spread = float(np.square(weight * (value - mean)).sum())
    return mean, (spread * count / (count - 1)) ** 0.5 / float(weight.sum())


def paired(own: Mapping, other: Mapping) -> dict[str, dict]:
    """What one model's fidelity is less another's, document by document.

    Args:
        own, other: results of `fidelity` on the same text.

    Returns:
        by "kl", "nll" (nats a token) and "agreement": difference (own - other), error, lower (documents on which own is
        lower), documents. Nothing where the results are not of the same documents.
    """
    mine, theirs = own.get("documents"), other.get("documents")
    if not mine or not theirs or any(mine[name] != theirs[name] for name in ("number", "tokens")):
        return {}
    found = {}
    for name in COMPARED:
        differences = [a - b for a, b in zip(mine[name], theirs[name], strict=True)]
        mean, error = mean_and_error(differences, mine["tokens"])
        lower = sum(difference < 0 for difference in differences)
        found[name] = {"difference": mean, "error": error, "lower": lower, "documents": len(differences)}
    return found
