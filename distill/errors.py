"""The exceptions that end a command in one message: the user can mend this, or asked for it."""

import os
import sys
from reprlib import Repr


class UserError(Exception):
    """Something a user gave or has cannot be used; the message names the value, where it stands, and the fix."""


class Interrupted(Exception):
    """The user, the system or a time limit asked to stop; everything is saved."""


def nearest(word: str, known) -> str:
    """`; did you mean X?` where a known word is near, else the list of them."""
    from difflib import get_close_matches

    known = sorted(str(item) for item in known)
    close = get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"


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
