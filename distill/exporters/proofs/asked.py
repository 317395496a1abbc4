"""The input of a proof, the same for every engine: real text in the student's tokens, and prompts to continue."""

import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.shipped import shipped_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.exporters.source import Source

CHARACTERS = 12  # characters of text that are read for each token needed


@dataclass(frozen=True)
class Reading:
    """How much text a proof reads, and how many tokens it generates.

    lengths: of the texts in tokens; they are unequal, with the shortest first. The last is longer than a chunk of any scan
    (256), and `within` makes it longer than the widest window of the layout. tokens: generated after each prompt. rows:
    positions, of all texts together, whose whole distribution is compared.
    """

    lengths: tuple[int, ...] = (24, 131, 333)
    tokens: int = 200
    rows: int = 96

    def within(self, source: "Source") -> "Reading":
        """Return the lengths for a student: longer than its windows, within its positions."""
        widest = max([*_windows(source.layout.mixers), *_sliding(source.config)], default=0)
        lengths = [*self.lengths[:-1], max(self.lengths[-1], widest + self.lengths[0])]
        room = getattr(source.config, "max_position_embeddings", None) or sum(lengths) + self.tokens
        tokens = min(self.tokens, room // 2)
        return Reading(tuple(min(length, room - tokens) for length in lengths), tokens, self.rows)


@dataclass(frozen=True)
class Asked:
    """The texts and prompts of a proof.

    texts: token ids. rows: for each text, the positions whose distribution is compared. prompts: token ids to continue, of
    unequal length. steps: tokens to generate. strings: the strings that the texts were made from, with all their tokens.
    """

    texts: list[list[int]]
    rows: list[list[int]]
    prompts: list[list[int]]
    steps: int
    strings: dict[str, list[int]]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", source: "Source", reading: Reading) -> "Asked":
        """Tokenize the shipped held-out text.

        Raises:
            UserError: the tokenizer gives too few tokens, or a token that the student has no embedding for.
        """
        reading = reading.within(source)
        documents = _documents()
        strings = dict(_text(tokenizer, documents, length, source.config.vocab_size) for length in reading.lengths)
        texts = [ids[:length] for ids, length in zip(strings.values(), reading.lengths, strict=True)]
        share = max(1, reading.rows // len(texts))
        rows = [sorted({round((len(text) - 1) * n / share) for n in range(1, share + 1)} | {0}) for text in texts]
        prompts = [text[: max(1, len(text) // 2)] for text in texts[:-1]] + texts[-1:]
        return cls(texts, rows, prompts, reading.tokens, strings)


def _text(tokenizer: "PreTrainedTokenizerBase", documents: Iterator[str], length: int, known: int) -> tuple[str, list[int]]:
    """Return as many documents as a length needs, as one string, and their tokens."""
    words = ""
    ids: list[int] = []
    while len(ids) < length:
        words += next(documents, "")[: CHARACTERS * length]
        before, ids = len(ids), tokenizer(words)["input_ids"]
        if len(ids) == before:
            raise UserError(
                f"the student's tokenizer gives {len(ids)} tokens for a text of {len(words)} characters; its files "
                "are damaged"
            )
    if max(ids) >= known:
        raise UserError(
            f"the student's tokenizer gives token {max(ids)}, but the student has {known}; they do not belong together"
        )
    return words, ids


def _documents() -> Iterator[str]:
    path = shipped_folder() / "text" / "heldout.jsonl.xz"
    with lzma.open(Path(path), "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _windows(options: Any, inside: bool = False) -> Iterator[int]:
    """Yield every window width in a layout's options."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            yield from _windows(value, inside or name == "window")
    elif inside and isinstance(options, int) and not isinstance(options, bool):
        yield options


def _sliding(config: Any) -> Iterator[int]:
    if isinstance(width := getattr(config, "sliding_window", None), int):
        yield width
