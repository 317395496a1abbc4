"""Answers in batches: prompts padded on the left, each row drawn with random numbers of its own.

A model's tokens come through `students.replayed`, one CUDA graph a token on a GPU; where its cache or attention cannot be
held in place (GPT-NeoX, Bloom), through transformers' own `generate`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from distill.chat import render
from distill.errors import UserError
from distill.text.chat_tokens import WHOSE
from students.decoding import GraphError
from students.generation import replayed

FIRST, SECOND = [{"role": "user", "content": "a"}], {"role": "assistant", "content": "b"}


class Said(NamedTuple):
    """An answer. finished: it ended by itself. tokens: its length, what ends it included."""

    text: str
    finished: bool
    tokens: int


class Speaker:
    """A model that answers prompts.

    Args:
        check: called before each token; it may raise. way: how tokens are made, found by a try on one token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.tokenizer, self.check = model, tokenizer, check
        self.tokens, self.temperature, self.top_p, self.seed = tokens, temperature, top_p, seed
        self.ends = ends_of(model, tokenizer)
        self.in_place = self._held()

    @property
    def way(self) -> str:
        """How tokens are made, in words."""
        return "students.replayed" if self.in_place else "transformers' generate"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], rows: Sequence[int]) -> list[Said]:
        """The answers to some prompts. rows: their numbers, which with the seed fix what is drawn."""
        draws = _Draws(rows, self)
        made = self._generated(prompts, self.tokens, draws)
        found = []
        for tokens in made[:, max(map(len, prompts)) :].tolist():
            end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
            text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found.append(Said(text, end is not None, len(tokens) if end is None else end + 1))
        return found

    def _generated(self, prompts: Sequence[list[int]], tokens: int, draws: LogitsProcessor | None) -> Int[Tensor, "b s"]:
        width, pad = max(map(len, prompts)), self.ends[0]
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=self.model.device)
        own = {"custom_generate": replayed} if self.in_place else {}
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=self.ends, pad_token_id=pad)
        with _own_settings(self.model, config):
            processors = LogitsProcessorList([] if draws is None else [draws])
            return self.model.generate(ids, attention_mask=mask, logits_processor=processors, **own)

    def _held(self) -> bool:
        """Whether the model decodes in place."""
        self.in_place = True
        try:
            self._generated([[self.ends[0]] * 2], 2, None)
        except GraphError:
            return False
        return True


class _Draws(LogitsProcessor):
    """Leaves of each row the token that is drawn, by the row's own random numbers: the inverse of the distribution's sum."""

    def __init__(self, rows: Sequence[int], speaker: Speaker) -> None:
        self.speaker, self.step = speaker, 0
        keys = [np.array([speaker.seed, row], np.uint64) for row in rows]
        drawn = [np.random.Generator(np.random.Philox(key=key)).random(speaker.tokens) for key in keys]
        self.drawn = torch.from_numpy(np.stack(drawn)) if speaker.temperature else None

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        self.speaker.check()
        if not bool(scores.amax(-1).isfinite().all()):
            raise UserError(
                "the model that answers gives logits that are not finite; try precision=float32, or look at its weights"
            )
        if self.drawn is None:
            return scores
        token = drawn_tokens(
            scores, self.drawn[:, self.step].to(scores.device), self.speaker.temperature, self.speaker.top_p
        )
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


def ends_of(model: PreTrainedModel, tokenizer) -> list[int]:
    """The tokens that end an answer: those of the model's settings, the tokenizer's, and what its template ends a turn with.

    Raises:
        UserError: there is none.
    """
    known = getattr(model.generation_config, "eos_token_id", None)
    found = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    size = model.get_input_embeddings().num_embeddings
    ends = list(dict.fromkeys(token for token in found if token is not None and 0 <= token < size))
    if not ends:
        raise UserError(f"{WHOSE} has no token that ends a text, so no answer would; name a teacher whose tokenizer has one")
    return ends


def _end_of_turn(tokenizer) -> int | None:
    """The first special token behind what the assistant said."""
    opened = render(tokenizer, FIRST, WHOSE, answer=True)
    whole = render(tokenizer, [*FIRST, SECOND], WHOSE)
    if not whole.startswith(opened):
        opened = whole[: whole.rindex(SECOND["content"])]
    behind = whole[len(opened) :].partition(SECOND["content"])[2]
    marks = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return next((token for token in tokenizer(behind, add_special_tokens=False)["input_ids"] if token in marks), None)


@contextmanager
def _own_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside the block the model generates by these settings, and by none that its files hold."""
    usual = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = usual
