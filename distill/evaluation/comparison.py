"""Comparison of results with the teacher's: shares of recall, wins and ties on tasks, recovery, crossover lengths."""

from collections.abc import Mapping

import numpy as np

DECODE, GRAPH = "decode_tokens_per_second", "graph_decode_tokens_per_second"
HALF = 0.5  # the teacher's lowest score of which a share is given
RESAMPLES = 400  # of the items, for the standard error of recovery


def wins_and_ties(student: str, teacher: str) -> dict:
    """Compare the answers of student and teacher to a task's items, "1" for a right and "0" for a wrong one.

    Returns:
        win: share of items that only the student gets right. tie: share that both or neither get right. win_or_tie: their
        sum, the win-and-tie rate. difference, difference_error: of the scores, with its standard error over the same items.
    """
    gain = _numbers(student) - _numbers(teacher)
    error = float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None
    return {
        "win": float((gain > 0).mean()),
        "tie": float((gain == 0).mean()),
        "win_or_tie": float((gain >= 0).mean()),
        "difference": float(gain.mean()),
        "difference_error": error,
    }


def recovery(pairs: Mapping[str, tuple[Mapping, Mapping]]) -> dict:
    """Return sum(student - chance) / sum(teacher - chance) over tasks, with a standard error from resampled items.

    Returns:
        score (None if the teacher is not above chance by two standard errors of that sum), error, tasks.
    """
    if not pairs:
        return {"score": None, "error": None, "tasks": []}
    chances = sum(own["chance"] for own, _ in pairs.values())
    draw = np.random.default_rng(0)
    sums = np.zeros((RESAMPLES + 1, 2))  # row 0: all items, not resampled
    for own, other in pairs.values():
        correct = np.stack([_numbers(own["correct"]), _numbers(other["correct"])], 1)
        sums[0] += correct.mean(0)
        for line in sums[1:]:
            line += correct[draw.integers(0, len(correct), len(correct))].mean(0)
    excess = sums - chances
    spread = excess[1:, 1].std()
    if excess[0, 1] <= 2 * spread:
        return {"score": None, "error": None, "tasks": list(pairs)}
    ratios = excess[1:, 0] / excess[1:, 1]
    return {"score": float(excess[0, 0] / excess[0, 1]), "error": float(ratios.std()), "tasks": list(pairs)}


def _faster(pairs: list[tuple[dict, dict]], rate: str) -> list[tuple[int, bool]]:
    """Return for each length whether the first of a pair of cells has the higher rate."""
    return [(own["length"], own[rate] > other[rate]) for own, other in pairs]


def crossovers(student: list[dict], teacher: list[dict]) -> list[dict]:
    """Return for each batch the shortest length from which on the student is faster at every length that both ran.

    Returns:
        a list of {batch, first_token, decode}: lengths, or None if there is none; with graph_decode if it was measured.
    """
    found = []
    for batch in sorted({cell["batch"] for cell in student}):
        pairs = [
            (cell, other)
            for cell in student
            for other in teacher
            if cell["batch"] == batch == other["batch"] and cell["length"] == other["length"]
            if "not_run" not in cell and "not_run" not in other
        ]
        first = [(own["length"], own["first_token_seconds"] < other["first_token_seconds"]) for own, other in pairs]
        found.append({"batch": batch, "first_token": _crossover(first), "decode": _crossover(_faster(pairs, DECODE))})
        graphs = [(own, other) for own, other in pairs if GRAPH in own and GRAPH in other]
        if graphs:
            found[-1]["graph_decode"] = _crossover(_faster(graphs, GRAPH))
    return found


def _crossover(faster: list[tuple[int, bool]]) -> int | None:
    start = None
    for length, is_faster in sorted(faster):
        start = (start or length) if is_faster else None
    return start


def shares(cells: list[dict], teacher: list[dict]) -> list[dict]:
    """Return recall as shares of the teacher's recall at the same length and depth: {length, depth, share}.

    A share is None if the teacher's own score is below one half.
    """
    found = []
    for cell, other in zip(cells, teacher, strict=True):
        own, reference = cell["recalled"] / cell["trials"], other["recalled"] / other["trials"]
        place = {name: cell[name] for name in ("length", "depth") if name in cell}
        found.append({**place, "share": own / reference if reference >= HALF else None})
    return found


def _numbers(correct: str) -> np.ndarray:
    return np.frombuffer(correct.encode(), dtype=np.uint8).astype(np.float64) - ord("0")
