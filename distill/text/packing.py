"""Packs whole documents into windows, for text with chats: an answer without its question would teach nothing.

A document as long as a window or shorter is never cut. A longer chat keeps the turns that fit, up to the last completion
that ends in the window: the kept part is what the template writes for that shorter chat. A chat whose first completion ends
beyond the window is left out. Other text that is longer is cut into pieces, as in text without chats. Pieces share windows,
the longest first, each in the fullest window that has room (best fit decreasing, 2404.10830). The room that is left is
padding of weight 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

NO_DOCUMENT = -1  # the document number, and the label, of padding


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of a document that ends at `stop`; the token at `stop` is not the document's."""

    document: int
    start: int
    end: int
    stop: int

    @property
    def scored(self) -> int:
        """How many of its tokens have a next one in the document."""
        return min(self.end, self.stop - 1) - self.start


@dataclass
class Kept:
    """The part of each document that is read. stops: where it ends; the document's start where it is left out. cut,
    left_out: the numbers of chats that lost turns, and of chats that are not read at all."""

    stops: np.ndarray
    cut: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)


def kept(starts: np.ndarray, lengths: np.ndarray, trained: np.ndarray | None, seq_len: int) -> Kept:
    """The part of each document that windows of `seq_len` tokens keep.

    Args:
        trained: 1 at each token that is trained on; None where all tokens are.
    """
    found = Kept(starts + lengths)
    if trained is None:
        return found
    for number in np.flatnonzero(lengths > seq_len).tolist():
        start = int(starts[number])
        marks = np.asarray(trained[start : start + int(lengths[number])], bool)
        if marks.all():  # other text, or a chat of which every token is trained on
            continue
        ends = np.flatnonzero(marks[:seq_len] & ~marks[1 : seq_len + 1])  # the last token of each completion
        if len(ends):
            found.stops[number] = start + ends[-1] + 1
            found.cut.append(number)
        else:
            found.stops[number] = start
            found.left_out.append(number)
    return found


def packed(starts: np.ndarray, stops: np.ndarray, seq_len: int) -> list[list[Piece]]:
    """The pieces of each window, in an order that depends only on the documents. Pieces with no token to predict are left
    out."""
    pieces = [
        Piece(number, begin, min(begin + seq_len, stop), stop)
        for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True))
        for begin in range(start, stop - 1, seq_len)
    ]
    windows: list[list[Piece]] = []
    with_room: dict[int, list[int]] = {}  # windows by their free tokens
    rooms = 0  # a bit for each number of free tokens that some window has
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.end):
        size = piece.end - piece.start
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            windows[window].append(piece)
        else:
            room, window = seq_len, len(windows)
            windows.append([piece])
        if left := room - size:
            with_room.setdefault(left, []).append(window)
            rooms |= 1 << left
    return windows


def laid(
    pieces: Sequence[Piece],
    seq_len: int,
    read: Callable[[int, int], np.ndarray],
    trained: Callable[[int, int], np.ndarray] | None,
    labels: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """A window of pieces: ids, document numbers in the window, positions, targets, weights, labels, document numbers in the
    text, and, for text with chats, the weights of only those positions whose next token is trained on.

    Args:
        read, trained: functions of start and stop that return tokens and marks [start, stop) of the text. labels: the label
            of each document.
    """
    made = []
    for place, piece in enumerate(pieces):
        count = piece.end - piece.start
        tokens = read(piece.start, min(piece.end + 1, piece.stop)).astype(np.int64)
        ids = tokens[:count]
        weights = (np.arange(count) < piece.scored).astype(np.float32)
        parts = [
            ids,
            np.full(count, place),
            np.arange(count),
            tokens[1:] if len(tokens) > count else np.append(ids[1:], ids[-1]),
            weights,
            np.full(count, labels[piece.document], np.int64),
            np.full(count, piece.document),
        ]
        if trained is not None:
            marks = trained(piece.start + 1, min(piece.end + 1, piece.stop))
            parts.append(weights * np.pad(marks, (0, count - len(marks))))
        made.append(parts)
    if room := seq_len - sum(piece.end - piece.start for piece in pieces):
        end, zeros = np.full(room, made[-1][0][-1]), np.zeros(room, np.float32)
        nobody = np.full(room, NO_DOCUMENT)
        last = [end, np.full(room, len(pieces)), np.arange(room), end, zeros, nobody, nobody]
        made.append(last + ([zeros] if trained is not None else []))
    return tuple(np.concatenate(parts) for parts in zip(*made, strict=True))
