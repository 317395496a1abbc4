"""Prepared tokens as training batches: packed windows with their documents, at a position that is one number.

b batch    t time
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import UserError
from distill.text.prepared import load


@dataclass(frozen=True)
class Batch:
    """Packed windows.

    documents: 0, 1, 2 ... within each window; positions start again with each. targets: the next token. weights: 1 where
    the next token belongs to the same document, 0 elsewhere. labels: the source of each token's text. windows: each
    window's place in the text, the same in every epoch, on the CPU; None where nothing counts them.
    """

    ids: Int[Tensor, "b t"]
    documents: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    weights: Float[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    windows: Int[Tensor, " b"] | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return self.ids.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items() if name != "windows"}
        return Batch(**moved, windows=self.windows)

    def rows(self, rows: slice) -> "Batch":
        """Some of the windows."""
        return Batch(**{name: tensor[rows] for name, tensor in vars(self).items() if tensor is not None})

    def shortened(self, time: int) -> "Batch":
        """The first tokens of each window, which is none of those that are counted any more."""
        return Batch(**{name: tensor[:, :time] for name, tensor in vars(self).items() if name != "windows"})


Calibration = Callable[[int], Iterable[Batch]]  # so many tokens of training text, from a stage's own first window on


@runtime_checkable
class Batches(Protocol):
    """What a trainer reads: windows of `seq_len` tokens by their number."""

    seq_len: int

    def batch(self, first: int, count: int) -> Batch:
        """Windows first .. first + count - 1."""
        ...


class Windows:
    """A prepared folder cut into windows, in an order that a seed fixes; window k of any run is always the same.

    tokens, starts: of its documents one after the other, and where each begins.
    """

    def __init__(self, folder: Path, seq_len: int, seed: int | None, in_order: bool = False) -> None:
        """seed: of the order; None keeps the folder's own (already shuffled) order. in_order: the windows of a document
        longer than a window follow each other.

        Raises:
            UserError: the folder is damaged, or holds less than one window.
        """
        self.folder, self.seq_len, self.seed, self.in_order = folder, seq_len, seed, in_order
        self.prepared = load(folder)
        self.meta, self.tokens = self.prepared.meta, self.prepared.tokens
        self.starts, self._labels = self.prepared.starts, self.prepared.labels
        self.count = (len(self.tokens) - 1) // seq_len
        if self.count < 1:
            raise UserError(f"data.seq_len is {seq_len}, but there are only {len(self.tokens)} tokens of text")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, the one that ends it included."""
        return np.diff(np.append(self.starts, len(self.tokens)))

    @property
    def label_names(self) -> list[str]:
        """The names that a batch's labels are indexes of."""
        return self.meta["labels"]

    def batch(self, first: int, count: int) -> Batch:
        """Windows first .. first + count - 1; past the last one the next epoch begins, in another order."""
        windows = [self._window(k) for k in range(first, first + count)]
        return Batch(*(torch.from_numpy(np.stack(parts)) for parts in zip(*windows, strict=True)))

    def at(self, places: Sequence[int] | np.ndarray) -> Batch:
        """The windows at some places in the text, as `places` and a batch's `windows` name them."""
        windows = [self._at(int(place)) for place in places]
        return Batch(*(torch.from_numpy(np.stack(parts)) for parts in zip(*windows, strict=True)))

    def _window(self, k: int) -> tuple[np.ndarray, ...]:
        epoch, index = divmod(k, self.count)
        return self._at(int(self._order(epoch)[index]))

    def _at(self, place: int) -> tuple[np.ndarray, ...]:
        start = place * self.seq_len
        places = np.arange(start, start + self.seq_len + 1)
        document = np.searchsorted(self.starts, places, side="right") - 1
        tokens = self.tokens[start : start + self.seq_len + 1].astype(np.int64)
        inside = np.maximum(self.starts[document], start)
        return (
            tokens[:-1],
            document[:-1] - document[0],
            (places - inside)[:-1],
            tokens[1:],
            (document[1:] == document[:-1]).astype(np.float32),
            self._labels[document[:-1]].astype(np.int64),
            np.array(place),
        )

    def places(self, first: int, count: int) -> np.ndarray:
        """The places in the text of windows first .. first + count - 1, each once, in the order in which they come first."""
        found, seen = [], np.zeros(self.count, bool)
        while count and not seen.all():
            epoch, index = divmod(first, self.count)
            taken = min(count, self.count - index)
            order = self._order(epoch)[index : index + taken]
            found.append(order[~seen[order]])
            seen[order] = True
            first, count = first + taken, count - taken
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return self._identity
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            generator = np.random.default_rng([self.seed, epoch])
            if self.in_order:
                rank = generator.permutation(self._runs[-1] + 1)
                self._permutation = np.argsort(rank[self._runs], kind="stable")
            else:
                self._permutation = generator.permutation(self.count)
        return self._permutation

    @cached_property
    def _runs(self) -> np.ndarray:
        """For each window, which run of windows it belongs to: one that begins inside a long document goes with the one
        before it, where the document came from."""
        first = np.arange(self.count) * self.seq_len
        document = np.searchsorted(self.starts, first, side="right") - 1
        goes_on = (self.starts[document] < first) & (self.lengths[document] > self.seq_len)
        return np.cumsum(~goes_on) - 1

    @cached_property
    def _identity(self) -> np.ndarray:
        return np.arange(self.count)
