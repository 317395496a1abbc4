"""Sampling of tokens with given random numbers, so that each row of a batch has its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel


def numbers(seed: int, rows: Sequence[int], count: int) -> Float[Tensor, "b n"]:
    """`count` random numbers in [0, 1) for each row; they depend only on the seed and the row's number."""
    keys = [np.array([seed, row], np.uint64) for row in rows]
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]))


class Draws(LogitsProcessor):
    """A logits processor that samples one token for each row and masks all others. Without numbers it masks nothing.

    Args:
        drawn: the random numbers, one for each row and step. check: called with each step's scores before sampling; it may
            raise.
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
    """Sample a token for each row by inversion: the token at which the cumulative sum of the row's sorted distribution
    exceeds its number in [0, 1).

    top_p: sample only from the most likely tokens whose probabilities add up to top_p, at least one (nucleus sampling,
        arXiv 1904.09751).
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
    """Inside the block, the model generates with these settings alone, and not with those of its files."""
    usual = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = usual
