"""Padding that mixers do not support: removed before a mixer and restored after it.

A mixer treats padding as a separate document, at which its state ends. That is correct before a sequence, and after one that
has ended. Where padding is inside a sequence, or comes before tokens that continue a cached one, the tokens are first moved
together into a form that the mixer supports:

    empty cache          text . text . .  ->  . . . text text      one call, padding in front
    sequence in cache    . text . text    ->  text text            one call for all rows with the same number of tokens

The skeleton around the mixers keeps every token at its place: its attention has the mask, and the teacher's positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from students.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Part:
    """Rows that go through a mixer in one call.

    rows: their indices in the batch; None for all. columns: the columns of their tokens, in order.
    """

    rows: Int[Tensor, " r"] | None
    columns: Int[Tensor, "r n"]
    documents: Int[Tensor, "r n"]

    def taken(self, tokens: Float[Tensor, "any t d"], batch: int) -> Float[Tensor, "r n d"]:
        """The part's values, from one value for each token of the batch or of a single row that stands for all."""
        rows, columns = self._places(tokens, batch)
        return tokens.expand(batch, -1, -1)[rows, columns]

    def put(self, into: Float[Tensor, "b t d"], tokens: Float[Tensor, "r n d"]) -> Float[Tensor, "b t d"]:
        """The reverse of `taken`: `into` with the part's values."""
        return into.index_put(self._places(into, len(into)), tokens)

    def _places(self, like: Tensor, batch: int) -> tuple[Int[Tensor, "r 1"], Int[Tensor, "r n"]]:
        rows = torch.arange(batch) if self.rows is None else self.rows
        return rows.to(like.device)[:, None], self.columns.to(like.device)


@dataclass(frozen=True)
class Unpadded:
    """A call's tokens without the padding that mixers do not support."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, documents: Int[Tensor, "b t"], begun: bool, goes_on: bool) -> "Unpadded | None":
        """The parts of a call; None where mixers support the padding as it is. Waits for the GPU.

        Args:
            documents: 0 for tokens, negative for padding. begun: the states hold a sequence already. goes_on: the states are
                kept for later tokens.
        """
        real = documents >= 0
        return cls._behind(real) if begun else cls._moved_up(real, documents, goes_on)

    @classmethod
    def _moved_up(cls, real: Tensor, documents: Tensor, goes_on: bool) -> "Unpadded | None":
        begins = real.clone()
        begins[:, 1:] &= ~real[:, :-1]
        unserved = begins.sum(1) > 1
        if goes_on:
            unserved = unserved | (real.any(1) & ~real[:, -1])
        if not bool(unserved.any()):
            return None
        columns = real.long().argsort(dim=1, stable=True)
        return cls((Part(None, columns, documents.gather(1, columns)),))

    @classmethod
    def _behind(cls, real: Tensor) -> "Unpadded | None":
        counts = real.sum(1).tolist()
        if min(counts) == real.shape[1]:
            return None
        columns, parts = (~real).long().argsort(dim=1, stable=True), []
        for count in sorted(set(counts) - {0}):
            rows = torch.tensor([row for row, own in enumerate(counts) if own == count], device=real.device)
            own = columns[rows, :count]
            parts.append(Part(rows, own, torch.zeros_like(own)))
        return cls(tuple(parts))


def last_columns(real: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"] | None:
    """Each column's own index, or after a row's last token the index of that token; None if every row ends in a token."""
    if bool(real[:, -1].all()):
        return None
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.where(real, index, torch.full_like(index, -1)).amax(1, keepdim=True)
    return torch.where((last >= 0) & (index > last), last, index)


@contextmanager
def ends_filled(body: nn.Module, real: Bool[Tensor, "b t"]) -> Iterator[None]:
    """Inside the block, padding at the end of a row gets the hidden state of the row's last token: the next token is
    predicted from the last column."""
    columns = last_columns(real)
    if columns is None:
        yield
        return

    def filled(module, arguments, output):
        if isinstance(output, tuple):
            return (_at(output[0], columns), *output[1:])
        output["last_hidden_state"] = _at(output["last_hidden_state"], columns)
        return output

    hook = body.register_forward_hook(filled)
    try:
        yield
    finally:
        hook.remove()


def _at(hidden: Float[Tensor, "b t d"], columns: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
    return hidden.gather(1, columns.to(hidden.device)[..., None].expand_as(hidden))


def check_windows(mask: Int[Tensor, "b s"], windows: dict[int, int], to_come: int = 0) -> None:
    """Refuse padding between tokens where a kept attention layer counts it among the tokens of its window.

    Args:
        windows: the window sizes of the kept attention layers. to_come: tokens that each row will still get.

    Raises:
        ValueError: naming the layer.
    """
    layer = min(windows, key=lambda layer: windows[layer], default=None)
    if layer is None or mask.shape[1] + to_come <= windows[layer]:
        return
    real, reach = mask.bool(), windows[layer]
    index = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(real, index, torch.full_like(index, mask.shape[1])).amin(1)
    last = torch.where(real, index, torch.full_like(index, -1)).amax(1)
    last = last if not to_come else torch.full_like(last, mask.shape[1] - 1)
    extent = last - first + 1
    if bool(((extent > real.sum(1)) & (extent + to_come > reach)).any()):
        raise ValueError(
            f"there is padding between the tokens of a row longer than {reach}: transformers counts it among the {reach} "
            f"tokens in the window of layer {layer}'s attention; move each row's tokens together, with padding on the left"
        )
