"""What a recall family makes: a sequence of tokens with its answers marked."""

import functools
import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from distill.evaluation.recall.wording import JUDGING, Wording
from distill.evaluation.scoring import Marked
from distill.text.encoding import opening

PLAIN_POOL = 256  # fewer word tokens than this, and any token will do


class Tokens:
    """A tokenizer and words as the families use them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Wording = JUDGING) -> None:
        """words: `JUDGING` of what a table shows, `SELECTING` of what chooses a layout."""
        self.tokenizer, self.words = tokenizer, words
        self.opening = opening(tokenizer)

    def ids(self, text: str) -> list[int]:
        """A text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def pool(self) -> list[int]:
        """Tokens for random sequences: a space and three lower-case letters or more, every other one of them for each
        wording; all where a vocabulary holds fewer than 512, and any but the special ones where it holds fewer than 256."""
        special = set(self.tokenizer.all_special_ids)
        every = [token for token in range(len(self.tokenizer)) if token not in special]
        texts = self.tokenizer.batch_decode([[token] for token in every])
        words = [token for token, text in zip(every, texts, strict=True) if _is_word(text)]
        if len(words) >= 2 * PLAIN_POOL:
            return words[self.words.turn :: 2]
        return words if len(words) >= PLAIN_POOL else every

    def draw(self, count: int, draw: random.Random) -> list[int]:
        """So many different random tokens, the same ones again only where the pool is smaller."""
        if count <= len(self.pool):
            return draw.sample(self.pool, count)
        return draw.choices(self.pool, k=count)

    def marked(self, body: list[int], question: str, answers: Sequence[str]) -> Marked:
        """Body, question and answers; each answer is a span. Spaces before an answer belong to it, as it is tokenised."""
        ids, spans = self.tail(question, answers)
        start = len(self.opening) + len(body)
        return Marked(self.opening + body + ids, tuple((start + first, start + last) for first, last in spans))

    def tail(self, question: str, answers: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a question followed by its answers, read as one text, and where each answer is among them."""
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
    """How many tokens two sequences begin with alike."""
    count = 0
    while count < min(len(part), len(whole)) and part[count] == whole[count]:
        count += 1
    return count
