"""Padding that no mixer serves as it stands: taken out before a mixer, and put back behind it.

A mixer knows padding as a document of its own, so a state ends there. That is right before a text, and behind one that is
over. Inside a text, or where a text in a cache goes on, the real tokens are moved together first, and the mixer sees a form
that it serves:

    nothing seen yet     text . text . .  ->  . . . text text      one call, padding in front
    a text in a cache    . text . text    ->  text text            one call for all rows with that many tokens

The skeleton around the mixers keeps every token where it is: its attention has the mask, and the teacher's positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from students.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Part:
    """Rows that go through a mixer together. rows: which of the batch; None for all. columns: of its tokens, in order."""

    rows: Int[Tensor, " r"] | None
    columns: Int[Tensor, "r n"]
    documents: Int[Tensor, "r n"]

    def taken(self, tokens: Float[Tensor, "any t d"], batch: int) -> Float[Tensor, "r n d"]:
        """The part's of what each token has, or of one row that stands for all."""
        rows, columns = self._places(tokens, batch)
        return tokens.expand(batch, -1, -1)[rows, columns]

    def put(self, into: Float[Tensor, "b t d"], tokens: Float[Tensor, "r n d"]) -> Float[Tensor, "b t d"]:
        """The reverse."""
        return into.index_put(self._places(into, len(into)), tokens)

    def _places(self, like: Tensor, batch: int) -> tuple[Int[Tensor, "r 1"], Int[Tensor, "r n"]]:
        rows = torch.arange(batch) if self.rows is None else self.rows
        return rows.to(like.device)[:, None], self.columns.to(like.device)


@dataclass(frozen=True)
class Unpadded:
    """A call's tokens without the padding that mixers do not serve."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, documents: Int[Tensor, "b t"], begun: bool, goes_on: bool) -> "Unpadded | None":
        """None where mixers serve the tokens as they stand. Waits for the GPU.

        Args:
            documents: 0 for tokens, negative for padding. begun: states hold a text already. goes_on: they are kept for one
                that is to come.
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
    """For each column itself, and behind a row's end its last token's; None where every row ends in one."""
    if bool(real[:, -1].all()):
        return None
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.where(real, index, torch.full_like(index, -1)).amax(1, keepdim=True)
    return torch.where((last >= 0) & (index > last), last, index)


@contextmanager
def ends_filled(body: nn.Module, real: Bool[Tensor, "b t"]) -> Iterator[None]:
    """While the block runs, a row that ends in padding has its last token's hidden state there: what comes next is asked of
    a row's end."""
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
    """Refuse padding inside a text where attention that stays counts it among the tokens of its window.

    Args:
        windows: of the layers that keep their attention. to_come: further tokens of each row.

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
            f"there is padding inside a text of more than {reach} tokens: transformers counts it among the {reach} that "
            f"layer {layer}'s attention looks back to; move each row's tokens together, with padding on the left"
        )
