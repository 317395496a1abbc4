"""The exceptions that end a command in one message: the user can mend this, or asked for it."""

import sys


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


def shown(value: object, most: int = 60) -> str:
    """A value as messages show it: as Python writes it, cut where it is long; of a number of thousands of digits that."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def explains_itself(error: Exception) -> bool:
    """Whether a message says all that is needed: of a UserError, or of kernels that were asked for and cannot be had."""
    kernels = sys.modules.get("students.kernels")  # not imported for its own sake: --help should be quick
    return isinstance(error, UserError | getattr(kernels, "BackendError", UserError))
