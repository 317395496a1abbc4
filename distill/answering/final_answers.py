"""Final answers: finds the one that a text states, and compares two; answers are marked against references with these.

A text may state its answer as "The answer is (B).", "So the answer is 1,200.", "Answer: 12", GSM8K's "#### 1200", or
\\boxed{1200}, near its end. Numbers are compared as numbers. An option's letter and the option's text are the same answer.
"""

import re
from fractions import Fraction

END = r"(?=\.(?:\s|$)|\n|$)"  # the end of a sentence, which the point of 3.5 is not
STATED = (
    re.compile(rf"\banswer\s+(?:is|was|would be|should be)\b:?\s*(?:that\s+)?(\S[^\n]*?){END}", re.IGNORECASE),
    re.compile(rf"^\W*(?:the\s+)?(?:final\s+)?answer\W*:\W*(\S[^\n]*?){END}", re.IGNORECASE | re.MULTILINE),
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"\\boxed\{([^{}]+)\}"),
)
LAST, LONGEST = 400, 120  # the most characters after a stated answer, and in it; with more, it is not the final answer
OPTION = re.compile(r"^\s*(?:-\s*)?\(?([A-Z])\s*[).]\s*(.+?)\s*$", re.MULTILINE)
LISTED = re.compile(r"^\s*[-*]\s+(.+?)\s*$", re.MULTILINE)
LETTER = re.compile(r"\W*(?:option\s+|choice\s+)?\(?([a-z])(?:[).:,]|\s|$)", re.IGNORECASE)
DIGITS = r"\d[\d,]*(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"(?:about|approximately|exactly|around|only)?\W*?(?P<sign>[-\u2212]?)[$€£]?\s*(?P<up>{DIGITS})(?:\s*/\s*(?P<down>\d+))?"
)
AROUND = " \t\n.,;:!\"'`*"


def final_answer(text: str) -> str | None:
    """The last final answer that a text states near its end, in its own words; None where it states none."""
    found = [match for pattern in STATED for match in pattern.finditer(text)]
    near = [match for match in found if len(text) - match.end() <= LAST and match[1].strip(AROUND)]
    last = max(near, key=lambda match: match.start(1), default=None)
    if last is None or len(last[1]) > LONGEST:
        return None
    return last[1].strip(AROUND)


def same(one: str, other: str, question: str = "") -> bool:
    """Whether two final answers are the same.

    Args:
        question: the question that both answer, whose options ("(A) ...", or "- ...") they may name.
    """
    lettered = {letter.lower(): _plain(text) for letter, text in OPTION.findall(question)}
    listed = list(lettered.values()) or [_plain(text) for text in LISTED.findall(question)]
    return _value(one, lettered, listed) == _value(other, lettered, listed)


def _value(said: str, lettered: dict[str, str], listed: list[str]) -> Fraction | str:
    """What an answer stands for: an option's text, a number, or its words."""
    letter, plain = LETTER.match(said), _plain(said)
    if plain in listed:
        return plain
    if letter and letter[1].lower() in lettered:
        return lettered[letter[1].lower()]
    named = [option for option in listed if option and f" {option} " in f" {plain} "]
    if len(named) == 1:
        return named[0]
    number = None if listed else NUMBER.match(said.rpartition("=")[2].strip())
    if number is None:
        return plain
    value = Fraction(number["up"].replace(",", "").rstrip("."))
    value = value / int(number["down"]) if number["down"] and int(number["down"]) else value
    return -value if number["sign"] else value


def _plain(text: str) -> str:
    """The words in lower case, without articles and punctuation."""
    words = re.sub(r"[^\w%+/.-]+|\.(?=\s|$)", " ", text).lower().split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or text.strip().lower()
