"""Tokenises long texts piece by piece: memory grows with a document's tokens, not with the tokenizer's working memory.

A tokenizer keeps some hundred bytes for each character that it reads at once, and some take quadratic time over a text
without spaces. So a long text is cut where the cut changes nothing: where the text around it has the same tokens in one part
and in two.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError, brief

AT_ONCE = 1 << 20  # characters tokenised at a time
ROWS = 256  # texts tokenised at a time
PIECE = 1 << 18  # characters, the most of one piece
AROUND = 256  # characters on each side of a cut that are looked at
TRIES = 32  # places that are tried

Row = tuple[Any, str]  # a label of any type, and a text
Labelled = Iterator[tuple[Any, Sequence[int] | np.ndarray]]  # a row's label, and its token ids

_log = logging.getLogger(__name__)


def tokenised(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase) -> Labelled:
    """Label and token ids of each row that is not blank, in order; the ids are those of the whole text, with the special
    tokens that the tokenizer puts around it."""
    for group in grouped(rows):
        yield from encoded(group, tokenizer)


def grouped(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Groups of rows to tokenise at a time, without blank rows; a long row is a group of its own."""
    held: list[Row] = []
    size = 0
    for label, text in rows:
        if not text.strip():
            continue
        if held and (size + len(text) > AT_ONCE or len(held) == ROWS or len(text) > PIECE):
            yield held
            held, size = [], 0
        held.append((label, text))
        size += len(text)
        if len(text) > PIECE:
            yield held
            held, size = [], 0
    if held:
        yield held


def encoded(group: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Any, Sequence[int] | np.ndarray]]:
    """Label and token ids of each row of a group."""
    ((label, text), *more) = group
    if not more and len(text) > PIECE and (frame := _frame(tokenizer)) is not None:
        return [(label, _long(text, tokenizer, *frame))]
    # a document may be longer than the model's context: it is cut into windows
    found = _ids(tokenizer, [text for _, text in group])
    return [(label, ids) for (label, _), ids in zip(group, found, strict=True)]


def _ids(tokenizer, texts: list[str], **options) -> list[list[int]]:
    """The tokens of texts.

    Raises:
        UserError: the tokenizer fails on a text; the message quotes the text's beginning.
    """
    try:
        return tokenizer(texts, verbose=False, **options)["input_ids"]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        if len(texts) > 1:
            return [_ids(tokenizer, [text], **options)[0] for text in texts]
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the teacher's tokenizer fails on the text that begins {brief(texts[0])}: {said}; leave the text out, or mend "
            "the tokenizer"
        ) from error


def _bare(tokenizer, texts: list[str]) -> list[list[int]]:
    return _ids(tokenizer, texts, add_special_tokens=False)


def _frame(tokenizer) -> tuple[list[int], list[int]] | None:
    """The tokens that the tokenizer puts before and after a text; None where they cannot be told apart from the text."""
    (bare,), whole = _bare(tokenizer, ["a"]), tokenizer("a")["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if bare and whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return None


def _long(text: str, tokenizer, before: list[int], behind: list[int]) -> np.ndarray:
    """The tokens of a long text, piece by piece."""
    found, held, blind = [np.asarray(before, np.uint32)], [], 0
    for piece in pieces(text, tokenizer):
        blind += not piece.seen
        held.append(piece)
        if sum(len(one.text) for one in held) + PIECE > AT_ONCE:
            found += _tokens(held, tokenizer)
            held = []
    found += _tokens(held, tokenizer)
    if blind:
        _log.warning(
            "a text of %s characters has stretches of %s in which every cut that was tried changes tokens: tokens around "
            "%d of its cuts may differ from those of the whole text",
            f"{len(text):,}",
            f"{PIECE // 2:,}",
            blind,
        )
    return np.concatenate([*found, np.asarray(behind, np.uint32)])


@dataclass(frozen=True)
class Piece:
    """A part of a text. extra: its first tokens, to be dropped, which the tokenizer adds because a text begins there. seen:
    whether the cut before it is known to change no token."""

    text: str
    extra: int = 0
    seen: bool = True


def pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Cut a text into pieces."""
    begin, extra, seen = 0, 0, True
    while len(text) - begin > PIECE:
        end, skip, further, known = _cut(text, begin, tokenizer)
        yield Piece(text[begin:end], extra, seen)
        begin, extra, seen = end + skip, further, known
    yield Piece(text[begin:], extra, seen)


def _tokens(held: Sequence[Piece], tokenizer) -> list[np.ndarray]:
    found = _bare(tokenizer, [piece.text for piece in held]) if held else []
    return [np.asarray(ids[piece.extra :], np.uint32) for piece, ids in zip(held, found, strict=True)]


def _cut(text: str, begin: int, tokenizer) -> tuple[int, int, int, bool]:
    """Returns where a piece ends, how many characters the next piece leaves out (a space that the tokenizer adds itself),
    how many of the next piece's first tokens to drop, and whether the cut changes no token."""
    for place in _candidates(text, begin):
        left, right = text[max(begin, place - AROUND) : place], text[place : place + AROUND]
        skips = [skip for skip in (0, 1) if right[:skip].isspace() or not skip]
        whole, first, *rests = _bare(tokenizer, [left + right, left, *(right[skip:] for skip in skips)])
        for skip, rest in zip(skips, rests, strict=True):
            if (extra := len(first) + len(rest) - len(whole)) in (0, 1) and whole == first + rest[extra:]:
                return place, skip, extra, True
    place = begin + PIECE
    for _ in range(AROUND):  # a combining mark belongs to the letter before it
        place -= not text[place].isalnum()
    return place, 0, 0, False


def _candidates(text: str, begin: int) -> Iterator[int]:
    """Places near the end of a piece, the last ones first: before a single space between words, then where words, signs and
    spaces meet, then any."""
    last, first = begin + PIECE, begin + PIECE // 2
    found, place = 0, last
    while found < TRIES and (place := text.rfind(" ", first, place)) > first:
        if text[place - 1].isalnum() and text[place + 1].isalnum():
            found += 1
            yield place
    kinds = [(letter.isalnum(), letter.isspace()) for letter in text[last - (1 << 12) : last]]
    borders = [index for index in range(len(kinds) - 1, 0, -1) if kinds[index] != kinds[index - 1]]
    yield from (last - len(kinds) + index for index in borders[:TRIES])
    yield from (place for place in range(last, last - TRIES, -1) if text[place] != text[place - 1])
