"""The exceptions that end a command in one message, that the user can mend or asked for, and how messages are rendered."""

import os
import re
import sys
from collections.abc import Iterable
from reprlib import Repr
from typing import Any

# What a terminal acts on instead of showing it: controls but line ends and tabs, marks that turn the direction of writing,
# and halves of characters, which are bytes of a name that is no UTF-8.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST, KEPT = 3000, 60  # characters of a message, and of each end of a word without end
ENDLESS = re.compile(r"\S{400,}")


def printable(text: object) -> str:
    """Text that a terminal shows and does not act on: what it would act on stands there as its number, `\\x1b`."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def shortened(text: str) -> str:
    """A message that can be read: of a value without end only its beginning and end are shown."""
    text = ENDLESS.sub(lambda found: f"{found[0][:KEPT]}...{found[0][-KEPT:]}", text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 10 * KEPT]} ... {text[-9 * KEPT :]}"


class Message(Exception):
    """An exception whose text is for people, wherever it is printed."""

    def __str__(self) -> str:
        return shortened(printable(super().__str__()))


class UserError(Message):
    """Something a user gave or has cannot be used; the message names the value, where it stands, and the fix."""


class Ended(Message):
    """The processes of a run did not all end well, and one of them said why. code: that a program ends with."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the processes of the run ended with exit code {code}; what ended them was printed")
        self.code = code


class Interrupted(Message):
    """The user, the system or a time limit asked to stop; everything is saved."""


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line, never an empty one: the system's reason where it gives one, else what the error
    says, else its kind; what only a programmer understands is left to --debug."""
    if isinstance(error, LookupError | TypeError | AttributeError | AssertionError | NameError):
        return "something inside that this message cannot name; --debug shows it"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


def nearest(word: str, known: Iterable[Any]) -> str:
    """`; did you mean X?` where a known word is near, else the list of them."""
    from difflib import get_close_matches

    names = sorted(str(item) for item in known)
    close = get_close_matches(str(word)[:100], names, n=1, cutoff=0.6)  # the time grows with the word's length
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def shown(value: object, most: int = 60) -> str:
    """A value as messages show it: as Python writes it, cut where it is long; of a number of thousands of digits that."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def named(name: object, most: int = 300) -> str:
    """A name of a file or column for a message: one line, control characters spelled out, its middle left out if long."""
    text = _cut(os.fsdecode(name) if isinstance(name, os.PathLike) else str(name), most)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def brief(value: object, most: int = 80) -> str:
    """A value for a message, as Python writes it, whatever its size and depth."""
    if isinstance(value, int) and value.bit_length() > 4 * most:
        return f"a number of {value.bit_length()} bits"
    writer = Repr()
    writer.maxstring = writer.maxother = writer.maxlong = most
    return _cut(writer.repr(value), 2 * most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"


def explains_itself(error: Exception) -> bool:
    """Whether a message says all that is needed: of a UserError, of kernels that were asked for and cannot be had, or of a
    cache that cannot be used."""
    known = [("students.kernels", "BackendError"), ("teachers.cache", "CacheError")]
    found = [getattr(sys.modules.get(module), name, UserError) for module, name in known]  # --help imports neither
    return isinstance(error, (UserError, *found))
