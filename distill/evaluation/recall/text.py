"""Recall families in words: a fact somewhere in a long text, asked for at its end.

Each takes (tokens, length, depth, draw) and returns a sequence of at most `length` tokens, unless its smallest form is
longer; `depth` in [0, 1] is the place of the fact, 0 being the beginning of the text.
"""

import itertools
import json
import lzma
import random
from collections.abc import Callable
from functools import cache

from distill.evaluation.recall.item import Tokens
from distill.evaluation.recall.wording import JUDGING
from distill.evaluation.scoring import Marked
from distill.shipped import shipped_folder

HOPS = 4  # assignments of a chain of variables


def passkey(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """A five-digit number in filler sentences (arXiv 2305.16300)."""
    key, words = str(draw.randint(10_000, 99_999)), tokens.words
    opening, fact = tokens.ids(words.passkey_opening), tokens.ids(words.passkey_fact.format(value=key))
    question = words.passkey_ask
    room = length - len(tokens.opening) - len(opening) - len(tokens.tail(question, [key])[0])
    return tokens.marked(opening + _around(fact, tokens.ids(words.filler), room, depth), question, [key])


def needle(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """A number that belongs to a city, in real text (RULER's single needle, arXiv 2404.06654)."""
    words = tokens.words
    city, number = draw.choice(words.needle_names.split()), str(draw.randint(1_000_000, 9_999_999))
    question, fact = words.needle_ask.format(name=city), tokens.ids(words.needle_fact.format(name=city, value=number))
    room = length - len(tokens.opening) - len(fact) - len(tokens.tail(question, [number])[0])
    hay = _haystack(tokens, max(0, room), draw)
    before = round(depth * len(hay))
    return tokens.marked(hay[:before] + fact + hay[before:], question, [number])


def key_value(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """One value of a JSON object of random hexadecimal keys and values (arXiv 2307.03172, with 8 digits for 32)."""

    def entry() -> tuple[str, str]:
        return f"{draw.getrandbits(32):08x}", f"{draw.getrandbits(32):08x}"

    words = tokens.words
    return _listed(tokens, length, depth, (words.pairs_heading, words.pairs_line, words.pairs_ask), entry)


def phone_book(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """One number of a list of names and telephone numbers (arXiv 2402.01032)."""
    words = tokens.words
    names = [f"{first} {last}" for first in words.first_names.split() for last in words.last_names.split()]
    draw.shuffle(names)
    unused = iter(names)

    def entry() -> tuple[str, str]:
        name = next(unused, None) or f"{draw.choice(names)} {draw.randint(2, 9999)}"
        return name, f"{draw.randint(2_000_000, 9_999_999)}"

    return _listed(tokens, length, depth, (words.book_heading, words.book_line, words.book_ask), entry)


def variable_tracking(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """Every variable that a value reaches through a chain of assignments among filler sentences (RULER, arXiv 2404.06654).

    The chain is spread over the whole text; its variables are asked for in order, each as one answer, given the
    ones before it. `depth` shifts the chain within its share of the text.
    """
    names = ["".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(HOPS + 1)]
    value, words = str(draw.randint(10_000, 99_999)), tokens.words
    facts = [words.variable_first.format(name=names[0], value=value)]
    facts += [words.variable_next.format(name=new, value=old) for old, new in itertools.pairwise(names)]
    question = words.variable_ask.format(value=value, count=HOPS + 1)
    answers = [f" {name}" for name in names]
    room = length - len(tokens.opening) - len(tokens.tail(question, answers)[0])
    share = room // len(facts)
    body = [token for fact in facts for token in _around(tokens.ids(fact), tokens.ids(words.filler), share, depth)]
    return tokens.marked(body, question, answers)


def _around(fact: list[int], unit: list[int], room: int, depth: float) -> list[int]:
    """Return a fact within as many whole units of filler as there is room for."""
    count = max(0, room - len(fact)) // len(unit)
    before = round(depth * count)
    return unit * before + fact + unit * (count - before)


def _listed(
    tokens: Tokens,
    length: int,
    depth: float,
    phrases: tuple[str, str, str],
    entry: Callable[[], tuple[str, str]],
) -> Marked:
    """Make a list of as many lines as fit, and a question about the line at a relative depth.

    Args:
        phrases: the heading, a line and the question. entry: the next name and value.
    """
    heading, line, question = phrases

    def of(first: tuple[str, str]) -> str:
        return line.format(name=first[0], value=first[1])

    first = entry()
    body = [tokens.ids(heading.format()), tokens.ids(of(first))]
    asked = tokens.tail(question.format(name=first[0]), [first[1]])[0]
    room = length - len(tokens.opening) - len(asked) - len(body[0]) - 2
    entries, used = [first], len(body[1])
    while True:
        new = entry()
        ids = tokens.ids(of(new))
        if used + len(ids) > room:
            break
        entries.append(new)
        body.append(ids)
        used += len(ids)
    key, value = entries[round(depth * (len(entries) - 1))]
    return tokens.marked([token for ids in body for token in ids], question.format(name=key), [value])


def _haystack(tokens: Tokens, count: int, draw: random.Random) -> list[int]:
    """Return `count` tokens of shipped text, from a random document on."""
    documents = _shipped_documents(tokens.words.hay)
    at = draw.randrange(len(documents))
    hay: list[int] = []
    while len(hay) < count:
        hay += tokens.ids(documents[at % len(documents)] + "\n\n")
        at += 1
    return hay[:count]


@cache
def _shipped_documents(name: str) -> list[str]:
    """Return the documents of a shipped file, without the training file's textbooks.

    The chapters of these begin as those of the held-out textbooks do.
    """
    with lzma.open(shipped_folder() / "text" / name, "rt") as file:
        rows = [json.loads(row) for row in file]
    return [row["text"] for row in rows if name == JUDGING.hay or row["source"] != "textbooks"]
