"""Meta tokens (Hymba, arXiv 2411.13676, section 2.3): learned vectors in front of every document.

A student with M meta tokens computes M more tokens per document than its input has, and returns outputs for the input's
tokens alone. Meta tokens come directly before a document's first token, after any padding on the left:

    padding padding  meta ... meta  text text text          a packed row:  meta ... meta  text text  meta ... meta  text

Meta tokens are the first tokens of the document. Positions count them, so the text's positions begin at M. The rotary
embedding depends only on differences of positions, and the differences between the text's tokens do not change. A window's
sinks are the first tokens of a document, so M sinks are the meta tokens.

In generation the meta tokens are computed once, in front of the prompt, and stay in the cache. The cache's length, as
`generate` reads it, counts the text alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from students.inputs import Inputs
from students.shapes import Bool, Float, Int

FILLER = -1  # the document of empty places at the end of a row that has fewer documents than another
START = "drawn from a normal distribution with the mean and deviation of the token embeddings, channel by channel"


class TextCache(Cache):
    """A cache whose length counts the text and not the meta tokens before it; `whole` has the same layers and counts both.

    first: columns of the first call, which put the meta tokens into the cache; 0 before that call.
    """

    def __init__(self, layers: list, meta_tokens: int) -> None:
        super().__init__(layers=layers)
        self.meta_tokens, self.first = meta_tokens, 0

    @property
    def whole(self) -> Cache:
        """The cache as the skeleton sees it: its length counts all keys, so the skeleton's masks are as wide as these."""
        return Cache(layers=self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(super().get_seq_length(layer_idx) - self.meta_tokens, 0)


class MetaTokens(nn.Module):
    """`count` learned embeddings, which are put into a skeleton's inputs and removed from its outputs.

    before_zero: whether the text's positions begin at 0, so that those of the meta tokens are negative.
    """

    def __init__(self, count: int, width: int, *, before_zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))
        self.origin = -count if before_zero else 0  # the position of the first meta token
        self.columns: Int[Tensor, "b t"] | None = None  # columns of the text's tokens, during a call with meta tokens

    def forward(self) -> Float[Tensor, "count d"]:
        """The embeddings. They are read by a call, so that hooks (offloading) can load them."""
        return self.weight

    @property
    def count(self) -> int:
        """The number of meta tokens before a document."""
        return self.weight.shape[0]

    @torch.no_grad()
    def start(self, embeddings: Float[Tensor, "v d"]) -> None:
        """Initialise by random draws with the mean and deviation of the vocabulary in every channel, with a fixed seed.

        Copies of one vector (the mean, or the first token's) with a little noise cost four times the KL: measured on a
        teacher with 128 of them in front (LOG.md).
        """
        mean, deviation = embeddings.float().mean(0), embeddings.float().std(0)
        noise = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(0)).to(mean.device)
        self.weight.copy_(mean + deviation * noise)

    @contextmanager
    def before(self, inputs: Inputs, body: nn.Module) -> Iterator[Inputs]:
        """The inputs with meta tokens in front of each document, for a direct or indirect call of `body`.

        Inside the block, the body returns outputs for the text alone.

        Raises:
            ValueError: a cache without places for meta tokens.
        """
        cache = inputs.cache
        if cache is not None:
            if not isinstance(cache, TextCache) or cache.meta_tokens != self.count:
                kind = type(cache).__name__
                raise ValueError(f"a {kind} has no room for {self.count} meta tokens; use the student's new_cache()")
            inputs = replace(inputs, cache=cache.whole)
        if cache is not None and cache.whole.get_seq_length():
            inputs, columns = self._behind(inputs, _seats(inputs, self.count, cache.first), cache.get_seq_length()), None
        else:
            first = inputs.size[1]
            seats = _seats(inputs, self.count, first)
            inputs, columns = (
                self._in_front(inputs, seats, cast(PreTrainedModel, body).get_input_embeddings()),
                seats.columns,
            )
            if cache is not None:
                cache.first = first
        hook = body.register_forward_hook(lambda *call: _text_alone(call[-1], columns, inputs.cache, cache))
        self.columns = columns
        try:
            yield inputs
        finally:
            self.columns = None
            hook.remove()

    def _in_front(self, inputs: Inputs, seats: "Seats", embed: nn.Module) -> Inputs:
        embeds = embed(inputs.input_ids) if inputs.inputs_embeds is None else inputs.inputs_embeds
        given, mask, documents = inputs.position_ids, inputs.attention_mask, inputs.documents
        embeds = seats.spread(embeds, self().to(embeds), 0.0)
        positions = None if given is None else seats.positions(given) + self.origin
        if given is None and self.origin:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + self.origin
        if mask is not None:
            mask = seats.spread(mask, mask.new_ones(self.count), 0)
            documents = None if documents is None else mask.long() - 1
        elif documents is not None:
            documents = seats.spread(documents, seats.of_starts(documents), FILLER)
        return replace(
            inputs, input_ids=None, inputs_embeds=embeds, attention_mask=mask, position_ids=positions, documents=documents
        )

    def _behind(self, inputs: Inputs, seats: "Seats", past: int) -> Inputs:
        """The inputs after a cache that holds the meta tokens: the mask and the positions count them."""
        positions, mask = inputs.position_ids, inputs.attention_mask
        if positions is not None:
            positions = positions + self.count + self.origin
        elif self.origin or mask is not None:
            index = torch.arange(past, past + inputs.size[1], device=_device(inputs))
            positions = index[None] + self.count + self.origin - seats.distance(mask)
        if mask is not None:
            mask = seats.spread(mask, mask.new_ones(self.count), 0)
        return replace(inputs, attention_mask=mask, position_ids=positions)


@dataclass(frozen=True)
class Seats:
    """The columns of a row's tokens after `count` meta tokens are put before each token that `starts` a document."""

    starts: Bool[Tensor, "b t"]
    count: int

    @property
    def columns(self) -> Int[Tensor, "b t"]:
        """Each token's column."""
        index = torch.arange(self.starts.shape[1], device=self.starts.device)
        return index + self.count * self.starts.cumsum(1)

    def spread(self, tokens: Tensor, meta: Tensor, filler: float) -> Tensor:
        """Tokens [b t ...] at their columns, `meta` [count ...] or [starts count] before each start, `filler` elsewhere."""
        columns, (rows, first) = self.columns, self.starts.nonzero(as_tuple=True)
        width = tokens.shape[1] + self.count * int(self.starts.sum(1).max())
        spread = tokens.new_full((tokens.shape[0], width, *tokens.shape[2:]), filler)
        at = torch.arange(len(tokens), device=tokens.device)[:, None]
        spread = spread.index_put((at, columns), tokens)
        before = columns[rows, first][:, None] + torch.arange(-self.count, 0, device=tokens.device)
        return spread.index_put((rows[:, None], before), meta)

    def distance(self, mask: Int[Tensor, "b s"] | None) -> Int[Tensor, "b 1"] | int:
        """The number of columns between a row's meta tokens and its first token: padding that came after them."""
        if mask is None:
            return 0
        real = mask.bool()
        first = torch.where(real.any(1), real.long().argmax(1), mask.shape[1])
        return (first - self.starts.long().argmax(1))[:, None]

    def of_starts(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "start count"]:
        """The values of the starting tokens, repeated for the meta tokens before each."""
        return tokens[self.starts][:, None].expand(-1, self.count)

    def positions(self, positions: Int[Tensor, "rows t"]) -> Int[Tensor, "b s"]:
        """Positions that count meta tokens too."""
        positions = positions.expand(self.starts.shape)
        begun = (self.starts.cumsum(1) > 0).to(positions.dtype)
        counted = torch.arange(self.count, device=positions.device)
        return self.spread(positions + self.count * begun, self.of_starts(positions) + counted, 0)


def _seats(inputs: Inputs, count: int, first: int) -> Seats:
    """The seats of a call's tokens, or, with a mask, of all the mask's columns: it also covers the cache.

    first: columns of the first call; each row's meta tokens are within these.
    """
    mask, documents = inputs.attention_mask, inputs.documents
    if mask is not None:
        real = mask.bool().clone()
        real[:, first - 1] |= ~real[:, :first].any(1)
        return Seats(real & (real.cumsum(1) == 1), count)
    if documents is None:
        starts = torch.zeros(inputs.size, dtype=torch.bool, device=_device(inputs))
        starts[:, 0] = True
        return Seats(starts, count)
    starts = documents >= 0
    starts[:, 1:] &= documents[:, 1:] != documents[:, :-1]
    return Seats(starts, count)


def _text_alone(output, columns: Int[Tensor, "b t"] | None, whole: Cache | None, cache: Cache | None):
    """A skeleton's outputs at the text's columns, with the caller's cache in place of `whole`."""

    def alone(value):
        if value is whole and whole is not None:
            return cache
        if isinstance(value, tuple):
            return tuple(map(alone, value))
        if columns is not None and isinstance(value, Tensor) and value.dim() == 3:
            return value.gather(1, columns[..., None].expand(-1, -1, value.shape[2]))
        return value

    if isinstance(output, tuple):
        return alone(output)
    for name, value in output.items():
        output[name] = alone(value)
    return output


def _device(inputs: Inputs) -> torch.device:
    return cast(Tensor, inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds).device
