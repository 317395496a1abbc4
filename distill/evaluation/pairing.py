"""Means over documents with their standard errors, and paired differences of two models on the same documents.

Tokens of one document are correlated, so an error counts documents, not tokens. Two rows of a table read the same documents,
and a document that is hard for one model is mostly hard for both. So their difference has a smaller error than either.
"""

from collections.abc import Mapping, Sequence

import numpy as np

COMPARED = {"kl": "lower", "nll": "lower", "agreement": "higher"}  # the better direction


def mean_and_error(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Return the weighted mean over documents, and its standard error.

    The error is that of a ratio estimator: for documents of equal weight, their standard deviation over the square root of
    their number. It is None for a single document.

    Args:
        values: one for each document. weights: tokens of each document.
    """
    value, weight = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    mean = float((value * weight).sum() / weight.sum())
    count = len(value)
    if count < 2:
        return mean, None
    spread = float(np.square(weight * (value - mean)).sum())
    return mean, (spread * count / (count - 1)) ** 0.5 / float(weight.sum())


def paired(own: Mapping, other: Mapping) -> dict[str, dict]:
    """Return one model's fidelity less another's, document by document.

    Args:
        own, other: results of `fidelity` on the same text.

    Returns:
        by "kl", "nll" (nats a token) and "agreement": difference (own - other), error, lower (documents on which own is
        lower), documents. Empty if the results are not on the same documents.
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
