"""Recall families in words: a fact somewhere in a long text, asked for at its end.

Each takes (tokens, length, depth, draw) and returns a sequence of at most `length` tokens, unless its smallest form is
longer; `depth` in [0, 1] says where the fact stands, 0 being the beginning of the text.
"""

import itertools
import json
import lzma
import random
from collections.abc import Callable
from functools import cache

from distill.evaluation.recall.item import Tokens
from distill.evaluation.scoring import Marked
from distill.shipped import shipped_folder

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FIRST = "Ada Alma Anton Bela Boris Clara Cora Dora Edgar Elena Felix Flora Greta Hugo Ida Igor Iris Ivan Jonas Karl Laura"
LAST = "Abbot Bauer Carver Dalton Ekman Fisher Garner Holm Irving Jansen Keller Lindt Marlow Norris Olsen Parker Quinn Rossi"
CITIES = "Berlin Cairo Delhi Geneva Havana Lima London Madrid Milan Moscow Oslo Paris Prague Quito Rome Seoul Sydney Tokyo"
HOPS = 4  # assignments of a chain of variables


def passkey(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """A five-digit number in filler sentences (arXiv 2305.16300)."""
    key = str(draw.randint(10_000, 99_999))
    opening = tokens.ids("There is an important number hidden in this text. Find it and remember it. ")
    fact = tokens.ids(f"The pass key is {key}. Remember it. {key} is the pass key. ")
    question = "What is the pass key? The pass key is "
    room = length - len(tokens.opening) - len(opening) - len(tokens.tail(question, [key])[0])
    return tokens.marked(opening + _around(fact, tokens.ids(FILLER), room, depth), question, [key])


def needle(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """A number that belongs to a city, in real text (RULER's single needle, arXiv 2404.06654)."""
    city, number = draw.choice(CITIES.split()), str(draw.randint(1_000_000, 9_999_999))
    question = f"\nWhat is the special magic number for {city}? The special magic number for {city} is "
    fact = tokens.ids(f" The special magic number for {city} is {number}.")
    room = length - len(tokens.opening) - len(fact) - len(tokens.tail(question, [number])[0])
    hay = _haystack(tokens, max(0, room), draw)
    before = round(depth * len(hay))
    return tokens.marked(hay[:before] + fact + hay[before:], question, [number])


def key_value(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """One value of a JSON object of random hexadecimal keys and values (arXiv 2307.03172, with 8 digits for 32)."""

    def entry() -> tuple[str, str]:
        return f"{draw.getrandbits(32):08x}", f"{draw.getrandbits(32):08x}"

    def line(key: str, value: str) -> str:
        return f' "{key}": "{value}",\n'

    def question(key: str) -> str:
        return f'}}\nThe value of "{key}" is:\n "{key}": "'

    return _listed(tokens, length, depth, "JSON data:\n{\n", entry, line, question)


def phone_book(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """One number of a list of names and telephone numbers (arXiv 2402.01032)."""
    names = [f"{first} {last}" for first in FIRST.split() for last in LAST.split()]
    draw.shuffle(names)
    unused = iter(names)

    def entry() -> tuple[str, str]:
        name = next(unused, None) or f"{draw.choice(names)} {draw.randint(2, 9999)}"
        return name, f"{draw.randint(2_000_000, 9_999_999)}"

    def question(name: str) -> str:
        return f"\nWhat is the number of {name}?\n{name}: "

    return _listed(tokens, length, depth, "Phone book:\n", entry, lambda name, number: f"{name}: {number}\n", question)


def variable_tracking(tokens: Tokens, length: int, depth: float, draw: random.Random) -> Marked:
    """Every variable that a value reaches through a chain of assignments among filler sentences (RULER, arXiv 2404.06654).

    The chain is spread over the whole text; its variables are asked for in its order, each an answer of its own, given the
    ones before it. `depth` shifts the chain within its share of the text.
    """
    names = ["".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(HOPS + 1)]
    value = str(draw.randint(10_000, 99_999))
    facts = [f"VAR {names[0]} = {value}. "]
    facts += [f"VAR {new} = VAR {old}. " for old, new in itertools.pairwise(names)]
    question = (
        f"\nFind all variables that are assigned the value {value} in the text above. {HOPS + 1} variables are assigned the "
        f"value {value}, they are:"
    )
    answers = [f" {name}" for name in names]
    room = length - len(tokens.opening) - len(tokens.tail(question, answers)[0])
    share = room // len(facts)
    body = [token for fact in facts for token in _around(tokens.ids(fact), tokens.ids(FILLER), share, depth)]
    return tokens.marked(body, question, answers)


def _around(fact: list[int], unit: list[int], room: int, depth: float) -> list[int]:
    """A fact within as many whole units of filler as there is room for."""
    count = max(0, room - len(fact)) // len(unit)
    before = round(depth * count)
    return unit * before + fact + unit * (count - before)


def _listed(
    tokens: Tokens,
    length: int,
    depth: float,
    heading: str,
    entry: Callable[[], tuple[str, str]],
    line: Callable[[str, str], str],
    question: Callable[[str], str],
) -> Marked:
    """Lines of a list as far as they fit, and the question for the one at a relative depth."""
    first = entry()
    body = [tokens.ids(heading), tokens.ids(line(*first))]
    room = length - len(tokens.opening) - len(tokens.tail(question(first[0]), [first[1]])[0]) - len(body[0]) - 2
    entries, used = [first], len(body[1])
    while True:
        new = entry()
        ids = tokens.ids(line(*new))
        if used + len(ids) > room:
            break
        entries.append(new)
        body.append(ids)
        used += len(ids)
    key, value = entries[round(depth * (len(entries) - 1))]
    return tokens.marked([token for ids in body for token in ids], question(key), [value])


def _haystack(tokens: Tokens, count: int, draw: random.Random) -> list[int]:
    """So many tokens of the shipped held-out text, from a random document on."""
    documents = _shipped_documents()
    at, hay = draw.randrange(len(documents)), []
    while len(hay) < count:
        hay += tokens.ids(documents[at % len(documents)] + "\n\n")
        at += 1
    return hay[:count]


@cache
def _shipped_documents() -> list[str]:
    with lzma.open(shipped_folder() / "text" / "heldout.jsonl.xz", "rt") as file:
        return [json.loads(row)["text"] for row in file]
