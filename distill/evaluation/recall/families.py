"""The table of recall families. To add one, write a function that makes its texts, and add a line to FAMILIES."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from distill.evaluation.recall.item import Tokens
from distill.evaluation.recall.text import key_value, needle, passkey, phone_book, variable_tracking
from distill.evaluation.recall.tokens import associative, induction
from distill.evaluation.scoring import Marked


class RecallFamily(NamedTuple):
    """One recall family.

    make: (tokens, length, depth, draw) -> a sequence with its answers marked. title: its name in tables, if its own is too
    long. grid: whether it is measured depth by depth; for other families depths are spread over a length's trials.
    """

    make: Callable[[Tokens, int, float, random.Random], Marked]
    title: str | None = None
    grid: bool = False


FAMILIES = {
    "passkey": RecallFamily(passkey),
    "needle": RecallFamily(needle, grid=True),
    "key_value": RecallFamily(key_value, "key-value"),
    "associative": RecallFamily(associative, "assoc."),
    "induction": RecallFamily(induction, "induct."),
    "phone_book": RecallFamily(phone_book, "phone b."),
    "variable_tracking": RecallFamily(variable_tracking, "variables"),
}
GRIDS = tuple(name for name, family in FAMILIES.items() if family.grid)


def title(family: str) -> str:
    """Return a family's name in tables, also for a family that no longer exists."""
    return (FAMILIES[family].title if family in FAMILIES else None) or family


def make(
    tokens: Tokens, family: str, length: int, trials: int, depths: Sequence[float] | None = None, seed: int = 0
) -> list[Marked]:
    """Make the sequences of a family at one length; they are the same for the same seed and tokenizer.

    Args:
        depths: one a trial; None spreads them evenly.
    """
    draw = random.Random(f"{seed} {family} {length}")
    depths = depths or [(trial + 0.5) / trials for trial in range(trials)]
    return [FAMILIES[family].make(tokens, length, depth, draw) for depth in depths]
