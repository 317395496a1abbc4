"""Answers in batches: prompts padded on the left, each row drawn with random numbers of its own.

A model's tokens come through `students.replayed`, one CUDA graph a token on a GPU; where its cache or attention cannot be
held in place (GPT-NeoX, Bloom), through transformers' own `generate`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from distill.chat import render
from distill.errors import UserError
from distill.sampling import Draws, numbers, own_settings
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
        tokenizer: PreTrainedTokenizerBase,
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
        drawn = numbers(self.seed, rows, self.tokens) if self.temperature else None
        draws = Draws(drawn, self.temperature, self.top_p, self._check)
        made = self._generated(prompts, self.tokens, draws)
        found = []
        for tokens in made[:, max(map(len, prompts)) :].tolist():
            end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
            text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found.append(Said(cast(str, text), end is not None, len(tokens) if end is None else end + 1))
        return found

    def _generated(self, prompts: Sequence[list[int]], tokens: int, draws: LogitsProcessor | None) -> Int[Tensor, "b s"]:
        width, pad = max(map(len, prompts)), self.ends[0]
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=self.model.device)
        own = {"custom_generate": replayed} if self.in_place else {}
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=self.ends, pad_token_id=pad)
        with own_settings(self.model, config):
            processors = LogitsProcessorList([] if draws is None else [draws])
            return cast(Any, self.model).generate(ids, attention_mask=mask, logits_processor=processors, **own)

    def _check(self, scores: Float[Tensor, "b v"]) -> None:
        self.check()
        if not bool(scores.amax(-1).isfinite().all()):
            raise UserError(
                "the model that answers gives logits that are not finite; try precision=float32, or look at its weights"
            )

    def _held(self) -> bool:
        """Whether the model decodes in place."""
        self.in_place = True
        try:
            self._generated([[self.ends[0]] * 2], 2, None)
        except GraphError:
            return False
        return True


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's settings, the tokenizer's, and what its template ends a turn with.

    Raises:
        UserError: there is none.
    """
    known = getattr(model.generation_config, "eos_token_id", None)
    found: list[Any] = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
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
