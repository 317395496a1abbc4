"""Prepared tokens as training batches of packed windows; the position of a run in its text is one number.

b batch    t time
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import UserError, named
from distill.text.packing import Kept, Piece, kept, laid, packed
from distill.text.prepared import Shard, load

SHARDS = 2**31  # part of the seed for the order of shards; no shard has this number


@dataclass(frozen=True)
class Batch:
    """Packed windows.

    documents: 0, 1, 2 ... within each window; positions start again with each. targets: the next token. weights: 1 where
    the next token belongs to the same document, 0 elsewhere. labels: the source of each token's text, negative for padding.
    windows: each window's place in the text, the same in every epoch, on the CPU; None where it is not needed. trained: for
    text with chats, 1 where the next token is also trained on (what the assistant said and what ends its turn; every token
    of other text), else 0; None where all tokens are trained on.
    """

    ids: Int[Tensor, "b t"]
    documents: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    weights: Float[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    windows: Int[Tensor, " b"] | None = None
    trained: Float[Tensor, "b t"] | None = None

    @property
    def loss_weights(self) -> Float[Tensor, "b t"]:
        """The weight of each position in a loss on the next token: `trained` where it is given, else `weights`."""
        return self.weights if self.trained is None else self.trained

    @property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return self.ids.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None and name != "windows"}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in present.items()}
        return Batch(**moved, windows=self.windows)

    def rows(self, rows: slice) -> "Batch":
        """Some of the windows."""
        return Batch(**{name: tensor[rows] for name, tensor in vars(self).items() if tensor is not None})

    def shortened(self, time: int) -> "Batch":
        """The first `time` tokens of each window; without `windows`, because these are whole windows no longer."""
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None and name != "windows"}
        return Batch(**{name: tensor[:, :time] for name, tensor in present.items()})


class Packing(NamedTuple):
    """A shard packed into windows, and the parts of its documents that were kept."""

    windows: list[list[Piece]]
    kept: Kept


def _batch(windows: Sequence[tuple[np.ndarray, ...]]) -> Batch:
    return Batch(*(torch.from_numpy(np.stack(parts)) for parts in zip(*windows, strict=True)))


Calibration = Callable[[int], Iterable[Batch]]  # batches with N tokens of training text, from the stage's first window on


@runtime_checkable
class Batches(Protocol):
    """Windows of `seq_len` tokens by their number, for a trainer to read."""

    seq_len: int

    def batch(self, first: int, count: int) -> Batch:
        """Windows first .. first + count - 1."""
        ...


class Windows:
    """A prepared folder cut into windows, in an order that a seed fixes: window k is the same in every run.

    No window crosses the border of two shards. The first epoch reads one shard after the other, each with its windows
    shuffled, so it needs only the part of a large text that it has reached; documents were shuffled when they were prepared.
    Later epochs shuffle the shards too. Text with chats is packed document by document (`packing`), so that no turn is cut.
    """

    unit, cut_at, reason = "chat", "a turn", "and no completion ends in a window"  # for messages
    needs = "has a completion that ends in it"

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
        that is longer than a window follow each other. key, where: the recipe's keys of seq_len and of the text.

        Raises:
            UserError: the folder is damaged, or holds less than one window.
        """
        self.folder, self.seq_len, self.seed, self.in_order = folder, seq_len, seed, in_order
        self.prepared = load(folder)
        self.meta = self.prepared.meta
        self._packed = self._packs()
        running = [(shard.counts.tokens - 1) // seq_len for shard in self.prepared.shards]
        self._counts = np.asarray(running if self._packed is None else [len(one.windows) for one in self._packed])
        self._firsts = np.cumsum(self._counts) - self._counts  # windows of the shards before each
        self.count = int(self._counts.sum())
        self._shards: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, order, windows before each
        self._windows: tuple[tuple[int, int], np.ndarray] | None = None  # epoch and shard, order
        if self.count < 1:
            of = f" in {where}" if where else ""
            if self.left_out:
                raise UserError(f"{key} is {seq_len}, and no {self.unit}{of} {self.needs}: {self.fitted}")
            raise UserError(f"{key} is {seq_len}, but there are only {self.prepared.tokens} tokens of text{of}")

    @property
    def label_names(self) -> list[str]:
        """The names that a batch's labels index."""
        return self.meta.labels

    @property
    def cut(self) -> int:
        """Chats that lost turns because they are longer than a window."""
        return sum(len(one.kept.cut) for one in self._packed or ())

    @property
    def left_out(self) -> int:
        """Chats whose first completion ends beyond a window, so that they are not read."""
        return sum(len(one.kept.left_out) for one in self._packed or ())

    @property
    def fitted(self) -> str | None:
        """A sentence on the chats that are longer than a window, with the first that is left out; None where all fit."""
        if not self.cut and not self.left_out:
            return None
        count = self.cut + self.left_out
        longer = f"{count:,} {self.unit}s are" if count > 1 else f"1 {self.unit} is"
        said = (
            f"{longer} longer than {self.seq_len} tokens: {self.cut:,} cut at the end of {self.cut_at}, "
            f"{self.left_out:,} not read"
        )
        for one, shard in zip(cast(list[Packing], self._packed), self.prepared.shards, strict=True):
            for number in one.kept.left_out[:1]:
                label, row = self.label_names[shard.labels[number]], shard.rows[number]
                length = f"{shard.lengths[number]:,} tokens"
                return f"{said}; the first that is not read is {named(label)}, row {row} ({length}, {self.reason})"
        return said

    def _packs(self) -> "list[Packing] | None":
        """The packing of each shard; None for text that is cut wherever a window ends."""
        return [self._pack(shard) for shard in self.prepared.shards] if self.prepared.marked else None

    def _pack(self, shard: Shard) -> "Packing":
        found = kept(shard.starts, shard.lengths, shard.trained, self.seq_len)
        return Packing(packed(shard.starts, found.stops, self.seq_len), found)

    def batch(self, first: int, count: int) -> Batch:
        """Windows first .. first + count - 1; past the last one the next epoch begins, in another order."""
        return _batch([self._window(k) for k in range(first, first + count)])

    def at(self, places: Sequence[int] | np.ndarray) -> Batch:
        """The windows at some places in the text, numbered as in `places()` and in a batch's `windows`."""
        return _batch([self._at(int(place)) for place in places])

    def _window(self, k: int) -> tuple[np.ndarray, ...]:
        epoch, index = divmod(k, self.count)
        shards, before = self._shard_order(epoch)
        place = int(np.searchsorted(before, index, side="right")) - 1
        number = int(shards[place])
        return self._at(int(self._firsts[number] + self._window_order(epoch, number)[index - before[place]]))

    def _at(self, place: int) -> tuple[np.ndarray, ...]:
        """The window at a place in the text: windows are counted over the shards, one after the other."""
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        index = place - int(self._firsts[number])
        if self._packed is None:
            return *self._cut(number, index * self.seq_len), np.array(place)
        shard, marks = self.prepared.shards[number], self._marks(number)
        *parts, _, trained = laid(
            self._packed[number].windows[index], self.seq_len, lambda a, b: shard.tokens[a:b], marks, shard.labels
        )
        return *parts, np.array(place), trained

    def _marks(self, number: int) -> Callable[[int, int], np.ndarray]:
        """The marks of a shard's tokens."""
        trained = self.prepared.shards[number].trained
        return lambda start, stop: np.ones(stop - start, np.uint8) if trained is None else trained[start:stop]

    def _cut(self, number: int, start: int) -> tuple[np.ndarray, ...]:
        """A window from a token of a shard on: ids, documents, positions, targets, weights and labels."""
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
        """The places in the text of windows first .. first + count - 1, each once, in order of first appearance."""
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
            generator = np.random.default_rng([self.seed, epoch, number])  # for shard 0 the same as [seed, epoch]
            if self.in_order and self._packed is None:
                runs = self._runs(number)
                order = np.argsort(generator.permutation(runs[-1] + 1)[runs], kind="stable")
            else:
                order = generator.permutation(count)
            self._windows = (epoch, number), order
        return self._windows[1]

    def _runs(self, number: int) -> np.ndarray:
        """The run of each window of a shard: a window that begins inside a long document is in the run of the one before."""
        shard = self.prepared.shards[number]
        first = np.arange(self._counts[number]) * self.seq_len
        document = np.searchsorted(shard.starts, first, side="right") - 1
        goes_on = (shard.starts[document] < first) & (shard.lengths[document] > self.seq_len)
        return np.cumsum(~goes_on) - 1
