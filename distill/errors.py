"""The exceptions that end a command with one message for the user, and functions that render messages safely."""

import os
import re
import sys
from collections.abc import Iterable
from reprlib import Repr
from typing import Any

# Characters that a terminal does not show but acts on: control characters except line ends and tabs, marks that change the
# direction of writing, and lone surrogates, which Python uses for the bytes of a file name that is not UTF-8.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST, KEPT = 3000, 60  # characters of a message, and of each end of an overlong word
ENDLESS = re.compile(r"\S{400,}")


def printable(text: object) -> str:
    """Text that is safe to print on a terminal: control characters are written as escapes, such as `\\x1b`."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def shortened(text: str) -> str:
    """A message of readable length: the middle of overlong words and of the message is left out."""
    text = ENDLESS.sub(lambda found: f"{found[0][:KEPT]}...{found[0][-KEPT:]}", text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 10 * KEPT]} ... {text[-9 * KEPT :]}"


class Message(Exception):
    """An exception whose text is rendered for the user: printable and shortened."""

    def __str__(self) -> str:
        return shortened(printable(super().__str__()))


class UserError(Message):
    """A value, file or setting of the user cannot be used; the message names it, its place and the fix."""


class Ended(Message):
    """A process of the run failed and has printed the reason. code: the exit code for the whole program."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the processes of the run ended with exit code {code}; the reason was printed")
        self.code = code


class Interrupted(Message):
    """The run was stopped by the user, the system or a time limit; everything is saved."""


def reason_of(error: BaseException) -> str:
    """The reason of an error in one line, which is never empty: the system's reason, else the error's text, else its type.

    Errors that only a programmer understands are left to --debug.
    """
    if isinstance(error, LookupError | TypeError | AttributeError | AssertionError | NameError):
        return "an internal error; --debug shows it"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


def nearest(word: str, known: Iterable[Any]) -> str:
    """`did you mean X?` if a known word is close, else the list of known words."""
    from difflib import get_close_matches

    names = sorted(str(item) for item in known)
    close = get_close_matches(str(word)[:100], names, n=1, cutoff=0.6)  # the time grows with the word's length
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def shown(value: object, most: int = 60) -> str:
    """A value for a message: its `repr`, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def named(name: object, most: int = 300) -> str:
    """A file's or column's name for a message: one line, control characters escaped, the middle left out if it is long."""
    text = _cut(os.fsdecode(name) if isinstance(name, os.PathLike) else str(name), most)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def brief(value: object, most: int = 80) -> str:
    """A value for a message: a `repr` of bounded length, for values of any size and depth."""
    if isinstance(value, int) and value.bit_length() > 4 * most:
        return f"a number of {value.bit_length()} bits"
    writer = Repr()
    writer.maxstring = writer.maxother = writer.maxlong = most
    return _cut(writer.repr(value), 2 * most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"


def explains_itself(error: Exception) -> bool:
    """Whether an error's message suffices without a traceback: a UserError, an unavailable kernel (`BackendError`) or an
    unusable cache (`CacheError`)."""
    known = [("students.kernels", "BackendError"), ("teachers.cache", "CacheError")]
    found = [getattr(sys.modules.get(module), name, UserError) for module, name in known]  # --help imports neither
    return isinstance(error, (UserError, *found))
