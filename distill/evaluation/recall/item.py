"""The tools of recall families: a tokenizer and words, which make sequences of tokens with their answers marked."""

import functools
import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from distill.evaluation.recall.wording import JUDGING, Wording
from distill.evaluation.scoring import Marked
from distill.text.encoding import opening

PLAIN_POOL = 256  # with fewer word tokens than this, all tokens are used


class Tokens:
    """A tokenizer and the words of the families."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Wording = JUDGING) -> None:
        """words: `JUDGING` for tables of results, `SELECTING` for the selection of a layout."""
        self.tokenizer, self.words = tokenizer, words
        self.opening = opening(tokenizer)

    def ids(self, text: str) -> list[int]:
        """Tokenize a text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def pool(self) -> list[int]:
        """Tokens for random sequences: those of a space and at least three lower-case letters.

        Each wording gets every other one of them. It gets all if a vocabulary holds fewer than 512, and all tokens but the
        special ones if it holds fewer than 256.
        """
        special = set(self.tokenizer.all_special_ids)
        every = [token for token in range(len(self.tokenizer)) if token not in special]
        texts = self.tokenizer.batch_decode([[token] for token in every])
        words = [token for token, text in zip(every, texts, strict=True) if _is_word(text)]
        if len(words) >= 2 * PLAIN_POOL:
            return words[self.words.turn :: 2]
        return words if len(words) >= PLAIN_POOL else every

    def draw(self, count: int, draw: random.Random) -> list[int]:
        """Return `count` random tokens. They differ, unless the pool is smaller."""
        if count <= len(self.pool):
            return draw.sample(self.pool, count)
        return draw.choices(self.pool, k=count)

    def marked(self, body: list[int], question: str, answers: Sequence[str]) -> Marked:
        """Join body, question and answers; each answer is a span. Spaces before an answer belong to it, as tokenised."""
        ids, spans = self.tail(question, answers)
        start = len(self.opening) + len(body)
        return Marked(self.opening + body + ids, tuple((start + first, start + last) for first, last in spans))

    def tail(self, question: str, answers: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a question followed by its answers, tokenised as one text, and the span of each answer."""
        text, ends = question, []
        for answer in answers:
            ends.append((len(text), len(text + answer)))
            text += answer
        whole = self.ids(text)
        return whole, [
            (_shared(self.ids(text[:start]), whole), _shared(self.ids(text[:end]), whole) if end < len(text) else len(whole))
            for start, end in ends
        ]


def _is_word(text: str) -> bool:
    word = text[1:]
    return text[:1] == " " and len(word) >= 3 and word.isascii() and word.isalpha() and word.islower()


def _shared(part: list[int], whole: list[int]) -> int:
    """Return how many tokens two sequences have in common at their start."""
    count = 0
    while count < min(len(part), len(whole)) and part[count] == whole[count]:
        count += 1
    return count
