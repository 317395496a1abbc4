"""Prepared tokens as training batches: packed windows with their documents, at a position that is one number.

b batch    t time
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import UserError
from distill.text.prepared import load

SHARDS = 2**31  # in the seed of the shards' order: no shard has that number


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

    No window goes over the border of two shards. The first epoch reads shard after shard, its windows in another order: so
    it needs no more of a large text than it has come to; documents are shuffled when they are prepared. Later epochs read
    the shards in another order too.
    """

    def __init__(
        self,
        folder: Path,
        seq_len: int,
        seed: int | None,
        in_order: bool = False,
        key: str = "data.seq_len",
        where: str = "",
    ) -> None:
        """seed: of the order; None keeps the folder's own (already shuffled) order. in_order: the windows of a document
        longer than a window follow each other. key, where: the recipe's keys of seq_len and
        of the text.

        Raises:
            UserError: the folder is damaged, or holds less than one window.
        """
        self.folder, self.seq_len, self.seed, self.in_order = folder, seq_len, seed, in_order
        self.prepared = load(folder)
        self.meta = self.prepared.meta
        self._counts = np.asarray([(shard.counts.tokens - 1) // seq_len for shard in self.prepared.shards])
        self._firsts = np.cumsum(self._counts) - self._counts  # windows of the shards before each
        self.count = int(self._counts.sum())
        self._shards: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, order, windows before each
        self._windows: tuple[tuple[int, int], np.ndarray] | None = None  # epoch and shard, order
        if self.count < 1:
            of = f" in {where}" if where else ""
            raise UserError(f"{key} is {seq_len}, but there are only {self.prepared.tokens} tokens of text{of}")

    @property
    def label_names(self) -> list[str]:
        """The names that a batch's labels are indexes of."""
        return self.meta.labels

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
        shards, before = self._shard_order(epoch)
        place = int(np.searchsorted(before, index, side="right")) - 1
        number = int(shards[place])
        return self._at(int(self._firsts[number] + self._window_order(epoch, number)[index - before[place]]))

    def _at(self, place: int) -> tuple[np.ndarray, ...]:
        """The window at a place in the text: windows are counted over the shards, one after the other."""
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        return *self._cut(number, (place - int(self._firsts[number])) * self.seq_len), np.array(place)

    def _cut(self, number: int, start: int) -> tuple[np.ndarray, ...]:
        """The tokens of a shard from one on: a window's ids, documents, positions, targets, weights and labels."""
        shard = self.prepared.shards[number]
        places = np.arange(start, start + self.seq_len + 1)
        document = np.searchsorted(shard.starts, places, side="right") - 1
        tokens = shard.tokens[start : start + self.seq_len + 1].astype(np.int64)
        inside = np.maximum(shard.starts[document], start)
        return (
            tokens[:-1],
            document[:-1] - document[0],
            (places - inside)[:-1],
            tokens[1:],
            (document[1:] == document[:-1]).astype(np.float32),
            shard.labels[document[:-1]].astype(np.int64),
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
        """The places of an epoch's windows."""
        shards, _ = self._shard_order(epoch)
        return np.concatenate([self._firsts[number] + self._window_order(epoch, int(number)) for number in shards])

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and how many windows come before those of each."""
        if self._shards is None or self._shards[0] != epoch:
            order = np.arange(len(self._counts))
            if epoch and self.seed is not None:
                order = np.random.default_rng([self.seed, epoch, SHARDS]).permutation(len(order))
            self._shards = epoch, order, np.cumsum(self._counts[order]) - self._counts[order]
        return self._shards[1:]

    def _window_order(self, epoch: int, number: int) -> np.ndarray:
        """The windows of a shard in the order of an epoch."""
        count = int(self._counts[number])
        if self.seed is None:
            return np.arange(count)
        if self._windows is None or self._windows[0] != (epoch, number):
            generator = np.random.default_rng([self.seed, epoch, number])  # of shard 0: as [seed, epoch]
            if self.in_order:
                runs = self._runs(number)
                order = np.argsort(generator.permutation(runs[-1] + 1)[runs], kind="stable")
            else:
                order = generator.permutation(count)
            self._windows = (epoch, number), order
        return self._windows[1]

    def _runs(self, number: int) -> np.ndarray:
        """For each window of a shard, which run of windows it belongs to: one that begins inside a long document goes with
        the one before it, where the document came from."""
        shard = self.prepared.shards[number]
        first = np.arange(self._counts[number]) * self.seq_len
        document = np.searchsorted(shard.starts, first, side="right") - 1
        goes_on = (shard.starts[document] < first) & (shard.lengths[document] > self.seq_len)
        return np.cumsum(~goes_on) - 1
