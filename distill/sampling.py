"""Tokens drawn by random numbers that are given, so that each row of a batch has its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel


def numbers(seed: int, rows: Sequence[int], count: int) -> Float[Tensor, "b n"]:
    """So many numbers in [0, 1) for each row; a row's are those of its own number and the seed."""
    keys = [np.array([seed, row], np.uint64) for row in rows]
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]))


class Draws(LogitsProcessor):
    """Leaves of each row the token that is drawn; all of them where there are no numbers.

    Args:
        check: called with each step's scores before anything is drawn; it may raise.
    """

    def __init__(
        self,
        drawn: Float[Tensor, "b n"] | None,
        temperature: float,
        top_p: float = 1.0,
        check: Callable[[Tensor], None] = lambda scores: None,
    ) -> None:
        self.drawn, self.temperature, self.top_p, self.check, self.step = drawn, temperature, top_p, check, 0

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        self.check(scores)
        if self.drawn is None:
            return scores
        token = drawn_tokens(scores, self.drawn[:, self.step].to(scores.device), self.temperature, self.top_p)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def drawn_tokens(
    scores: Float[Tensor, "b v"], numbers: Float[Tensor, " b"], temperature: float, top_p: float
) -> Int[Tensor, " b"]:
    """The tokens at which the sum over a row's distribution, the likeliest first, passes its number between 0 and 1.

    top_p: the likeliest tokens that hold so much of it, always one (nucleus sampling, arXiv 1904.09751).
    """
    shares, order = torch.sort((scores.double() / temperature).softmax(-1), dim=-1, descending=True, stable=True)
    sums = shares.cumsum(-1)
    kept = sums - shares < top_p
    sums = (shares * kept).cumsum(-1)
    place = torch.searchsorted(sums, numbers[:, None].double() * sums[:, -1:], right=True)[:, 0]
    place = torch.minimum(place, kept.sum(-1) - 1)
    return order.gather(1, place[:, None])[:, 0]


@contextmanager
def own_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside the block the model generates by these settings, and by none that its files hold."""
    usual = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = usual
