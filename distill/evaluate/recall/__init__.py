"""Recall: what a state forgets and averages over text hide. Families of made-up texts that ask for what they hold.

One way of scoring for all: the answers stand in the sequence, one forward pass reads it, and an answer counts when each of
its tokens is the model's first choice in the whole vocabulary given everything before it, which is what greedy decoding
would have said. A score is the share of answers that count, so chance is 0. Where a sequence has several answers, those
before an answer are given. Texts are made with the teacher's tokenizer; a seed fixes them.
"""

import random
from collections.abc import Sequence

from torch import nn

from distill.evaluate.recall.item import Tokens
from distill.evaluate.recall.text import key_value, needle, passkey, phone_book, variable_tracking
from distill.evaluate.recall.tokens import associative, induction
from distill.evaluate.scoring import Marked, score
from distill.evaluate.suites import Suite
from teachers.teacher import Teacher

FAMILIES = {
    "passkey": passkey,
    "needle": needle,
    "key_value": key_value,
    "associative": associative,
    "induction": induction,
    "phone_book": phone_book,
    "variable_tracking": variable_tracking,
}
GRIDS = ("needle",)  # measured depth by depth; the others at depths spread over a length's trials


def make(
    tokens: Tokens, family: str, length: int, trials: int, depths: Sequence[float] | None = None, seed: int = 0
) -> list[Marked]:
    """The sequences of a family at one length; the same for the same seed and tokenizer.

    Args:
        depths: one a trial; None spreads them evenly.
    """
    draw = random.Random(f"{seed} {family} {length}")
    depths = depths or [(trial + 0.5) / trials for trial in range(trials)]
    return [FAMILIES[family](tokens, length, depth, draw) for depth in depths]


def recall(
    teacher: Teacher, model: nn.Module | None, family: str, lengths: Sequence[int], trials: int, depths: Sequence[float] = ()
) -> list[dict]:
    """A family's scores; `model` None asks the teacher.

    Args:
        trials: sequences of each length, or of each length and depth. depths: of a grid; none for one cell a length.

    Returns:
        a list of {length, depth (grids alone), recalled, trials, score}: answers that count, answers, and their ratio.
    """
    tokens, cells = Tokens(teacher.tokenizer), []
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


def passkey_row(teacher: Teacher, model: nn.Module | None, heldout, suite: Suite) -> list[dict]:
    """Passkey recall as the table of evaluations calls it: a list of {length, recalled, trials}."""
    cells = recall(teacher, model, "passkey", suite.passkey, suite.passkey_trials)
    return [{name: cell[name] for name in ("length", "recalled", "trials")} for cell in cells]


def row(teacher: Teacher, model: nn.Module | None, heldout, suite: Suite) -> dict[str, list[dict]]:
    """Every other family as the table of evaluations calls it: {family: cells}."""
    found = {}
    for family in FAMILIES:
        if family in GRIDS:
            found[family] = recall(teacher, model, family, suite.recall, suite.grid_trials, suite.depths)
        elif family != "passkey":
            found[family] = recall(teacher, model, family, suite.recall, suite.recall_trials)
    return found
