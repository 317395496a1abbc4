"""Held-out text in windows that begin with a document, so that standard errors can be taken over documents.

Windows cut from running text hold neighbouring pieces of one document, and their results are correlated: a standard error
over windows is then too small, and eight windows may be only three documents. Here the first windows hold the first piece of
each document, one document after the other; the next windows hold the second pieces, and so on. Short pieces share a window;
the room that is left is padding, which is not scored. A chat that is longer than a window keeps the turns that fit and has
no second piece (`packing.kept`).
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from distill.errors import UserError
from distill.text.packing import Piece, kept, laid
from distill.text.prepared import Prepared
from distill.text.windows import Batch

SELECTION = 0.75  # the share of the held-out tokens after which the part for selections begins; tables do not read that part
NEAR = (0.5, 0.9)  # the shares of the held-out tokens between which that part may begin


class DocumentWindows:
    """A part of a prepared text, in windows by document."""

    def __init__(self, text: Prepared, seq_len: int, first: int = 0, last: int | None = None) -> None:
        """first, last: the part of the text, in tokens; all of it by default."""
        self.seq_len, self._text = seq_len, text
        self.first, self.last = first, text.tokens if last is None else last
        trained = text.marks(0, text.tokens) if text.marked else None
        self._stops = kept(text.starts, text.lengths, trained, seq_len).stops

    def batches(self, tokens: int, size: int) -> Iterator[tuple[Batch, Int[Tensor, "b t"]]]:
        """Batches of up to `size` windows, which hold `tokens` tokens in all, with the number of every token's document.

        Raises:
            UserError: no token of the text has a next token in its document.
        """
        windows = self._windows(-(-tokens // self.seq_len))
        if not windows:
            raise UserError(
                f"the held-out text has no token to score among {self.last - self.first:,}: each of its documents is one "
                "token long; name text with longer documents under data.heldout"
            )
        for start in range(0, len(windows), size):
            made = [self._window(pieces) for pieces in windows[start : start + size]]
            stacked = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*made, strict=True)]
            *parts, documents = stacked[:7]
            trained = stacked[7] if self._text.marked else None
            ids, places, positions, targets, weights, labels = parts
            yield Batch(ids, places, positions, targets, weights, labels, trained=trained), documents

    def _windows(self, count: int) -> list[list[Piece]]:
        """The pieces of the first `count` windows."""
        windows: list[list[Piece]] = []
        room = 0
        for piece in self._pieces():
            if piece.end - piece.start > room:
                if len(windows) == count:
                    break
                windows.append([])
                room = self.seq_len
            windows[-1].append(piece)
            room -= piece.end - piece.start
        return windows

    def _pieces(self) -> Iterator[Piece]:
        """Every piece with something to score: the first of each document, then the second ones, and so on."""
        starts = np.maximum(self._text.starts, self.first)
        stops = np.minimum(self._stops, self.last)
        inside, offset = np.arange(len(starts)), 0
        while len(inside := inside[starts[inside] + offset < stops[inside] - 1]):
            for number in inside:
                begin, stop = int(starts[number]) + offset, int(stops[number])
                yield Piece(int(number), begin, min(begin + self.seq_len, stop), stop)
            offset += self.seq_len

    def _window(self, pieces: list[Piece]) -> tuple[np.ndarray, ...]:
        """A window's ids, document numbers in the window, positions, targets, weights, labels, document numbers in the text,
        and marks."""
        text = self._text
        return laid(pieces, self.seq_len, text.read, text.marks if text.marked else None, text.labels)


def selection_begins(text: Prepared) -> int:
    """The first token of the part of a held-out text that selections read: about three quarters in, where a document begins.

    Tables of results read the text before it, and selections the text after it: text that chose a layout cannot judge it.
    """
    starts, tokens = text.starts, text.tokens
    wanted = round(SELECTION * tokens)
    near = starts[(starts >= NEAR[0] * tokens) & (starts <= NEAR[1] * tokens)]
    return int(near[np.abs(near - wanted).argmin()]) if len(near) else wanted
