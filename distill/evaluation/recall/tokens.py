"""Recall families of random tokens, the same for every tokenizer: the model must repeat what a sequence held before."""

import random

from distill.evaluation.recall.item import Tokens
from distill.evaluation.scoring import Marked

QUERIES = 8  # of one sequence of pairs


def associative(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """Multi-query associative recall (arXiv 2312.04927): pairs of random tokens, then eight of the keys.

    Each of these keys must be followed by its value. `depth` is not used: the queries are spread over all pairs.
    """
    pairs = max(1, min((length - len(tokens.opening) - 2 * QUERIES) // 2, len(tokens.pool) // 2))
    drawn = tokens.draw(2 * pairs, draw)
    keys, values = drawn[:pairs], drawn[pairs:]
    asked = sorted(draw.sample(range(pairs), min(QUERIES, pairs)))
    draw.shuffle(asked)
    body = [token for pair in zip(keys, values, strict=True) for token in pair]
    start = len(tokens.opening) + len(body)
    ids = tokens.opening + body + [token for index in asked for token in (keys[index], values[index])]
    return Marked(ids, tuple((start + 2 * n + 1, start + 2 * n + 2) for n in range(len(asked))))


def induction(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """A random sequence repeated (arXiv 2209.11895): each token of the repetition but the first is an answer.

    `depth` is not used.
    """
    half = max(2, (length - len(tokens.opening)) // 2)
    sequence = tokens.draw(half, draw)
    start = len(tokens.opening) + half
    return Marked(tokens.opening + sequence * 2, tuple((place, place + 1) for place in range(start + 1, start + half)))
