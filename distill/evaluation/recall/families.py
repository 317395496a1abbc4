"""The table of recall families. To add one: a function that makes its texts, and a line here."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from distill.evaluation.recall.item import Tokens
from distill.evaluation.recall.text import key_value, needle, passkey, phone_book, variable_tracking
from distill.evaluation.recall.tokens import associative, induction
from distill.evaluation.scoring import Marked


class RecallFamily(NamedTuple):
    """One family.

    make: (tokens, length, depth, draw) -> a sequence with its answers marked. title: in tables, where the name is too long.
    grid: measured depth by depth; the others at depths spread over a length's trials.
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
    """What tables call a family, also one that is in the table no more."""
    return (FAMILIES[family].title if family in FAMILIES else None) or family


def make(
    tokens: Tokens, family: str, length: int, trials: int, depths: Sequence[float] | None = None, seed: int = 0
) -> list[Marked]:
    """The sequences of a family at one length; the same for the same seed and tokenizer.

    Args:
        depths: one a trial; None spreads them evenly.
    """
    draw = random.Random(f"{seed} {family} {length}")
    depths = depths or [(trial + 0.5) / trials for trial in range(trials)]
    return [FAMILIES[family].make(tokens, length, depth, draw) for depth in depths]
