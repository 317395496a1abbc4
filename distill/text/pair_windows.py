"""Preference pairs in windows: one window for the chosen and one for the rejected answer, which always follow each other.

Each is cut at the end of its window. A pair is left out where its prompt leaves no room for an answer, or where the kept
parts of both are the same. The last tenth of the pairs, at most 256, is held out: no window of it is trained on.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from distill.errors import UserError
from distill.text.packing import Kept, Piece, laid
from distill.text.pair_tokens import SECOND
from distill.text.prepared import Shard
from distill.text.windows import Batch, Packing, Windows

HELD, MOST = 10, 256  # one pair in HELD is held out, and at most MOST
LENGTHS = 4  # how many lengths a batch may have: quarters of seq_len


class PairWindows(Windows):
    """`Windows` of a folder of pairs. Windows 2k and 2k + 1 of any order are a pair.

    A batch is as long as its longest window, rounded up to a quarter of `seq_len`.
    """

    unit, cut_at, reason = "pair", "the window", "and its prompt leaves no room for both answers"
    needs = "has room for both answers in it"

    def __init__(
        self,
        folder: Path,
        seq_len: int,
        seed: int | None,
        in_order: bool = False,
        key: str = "data.seq_len",
        where: str = "",
    ) -> None:
        self.held: list[tuple[int, list[Piece]]] = []  # the shard and the piece of each held-out window
        super().__init__(folder, seq_len, seed, in_order, key, where)
        if not self.held:
            raise UserError(f"{where}: there is only one pair, and another one is needed to be held out; name more text")

    def _packs(self) -> list[Packing]:
        made = [self._pack(shard) for shard in self.prepared.shards]
        pairs = sum(len(one.windows) for one in made) // 2
        spare = min(MOST, max(1, pairs // HELD)) if pairs > 1 else 0
        for number in range(len(made) - 1, -1, -1):
            windows = made[number].windows
            taken = min(2 * spare, len(windows))
            self.held[:0] = [(number, pieces) for pieces in windows[len(windows) - taken :]]
            del windows[len(windows) - taken :]
            spare -= taken // 2
        return made

    def _pack(self, shard: Shard) -> Packing:
        kept, windows = Kept(shard.starts + shard.lengths), []
        for number, (start, length) in enumerate(zip(shard.starts.tolist(), shard.lengths.tolist(), strict=True)):
            marks = np.asarray(cast(np.ndarray, shard.trained)[start : start + length])
            middle, stop = (start + int(np.flatnonzero(marks == mark)[-1]) + 1 for mark in (1, SECOND))
            halves = [(start, middle), (middle, stop)]
            short = [(first, min(last, first + self.seq_len + 1)) for first, last in halves]
            if halves != short:
                (kept.cut if self._kept(shard, short) else kept.left_out).append(number)
                if kept.left_out[-1:] == [number]:
                    continue
            windows += [[Piece(number, first, min(last, first + self.seq_len), last)] for first, last in short]
        return Packing(windows, kept)

    def _kept(self, shard: Shard, halves: list[tuple[int, int]]) -> bool:
        """Whether both answers keep a token, and the kept halves differ."""
        arrays = (shard.tokens, cast(np.ndarray, shard.trained))
        (first, second), marks = ([np.asarray(array[a:b]) for a, b in halves] for array in arrays)
        return all(mark.any() for mark in marks) and not np.array_equal(first, second)

    def batch(self, first: int, count: int) -> Batch:
        return _shortened(super().batch(first, count), self.seq_len)

    def at(self, places: Sequence[int] | np.ndarray) -> Batch:
        return _shortened(super().at(places), self.seq_len)

    def held_batches(self, count: int) -> Iterator[Batch]:
        """The held-out pairs, `count` windows at a time; their places come after those of all other windows."""
        for first in range(self.count, self.count + len(self.held), count):
            yield self.at(range(first, min(first + count, self.count + len(self.held))))

    def _at(self, place: int) -> tuple[np.ndarray, ...]:
        if place < self.count:
            number = int(np.searchsorted(self._firsts, place, side="right")) - 1
            pieces = cast(list[Packing], self._packed)[number].windows[place - int(self._firsts[number])]
        else:
            number, pieces = self.held[place - self.count]
        shard = self.prepared.shards[number]
        *parts, _, trained = laid(
            pieces,
            self.seq_len,
            lambda a, b: shard.tokens[a:b],
            lambda a, b: np.asarray(cast(np.ndarray, shard.trained)[a:b]) > 0,
            shard.labels,
        )
        return *parts, np.array(place), trained.astype(np.float32)

    def _window_order(self, epoch: int, number: int) -> np.ndarray:
        """Pairs in the order of an epoch, the two windows of each together."""
        pairs = np.arange(int(self._counts[number]) // 2)
        if self.seed is not None:
            pairs = np.random.default_rng([self.seed, epoch, number]).permutation(pairs)
        return (2 * pairs[:, None] + np.arange(2)).reshape(-1)


def _shortened(batch: Batch, seq_len: int) -> Batch:
    """The batch cut to the length that its longest window needs, in quarters of `seq_len`."""
    longest, quarter = int((batch.labels >= 0).sum(1).max()), -(-seq_len // LENGTHS)
    time = min(seq_len, -(-longest // quarter) * quarter)
    if time == seq_len:
        return batch
    short = batch.shortened(time)
    return Batch(**{**vars(short), "windows": torch.as_tensor(batch.windows)})
