"""The one exception that means: the user can mend this. The command line prints it without a traceback."""

import sys


class UserError(Exception):
    """Something a user gave or has cannot be used; the message names the value, where it stands, and the fix."""


def nearest(word: str, known) -> str:
    """`; did you mean X?` where a known word is near, else the list of them."""
    from difflib import get_close_matches

    known = sorted(str(item) for item in known)
    close = get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"


def explains_itself(error: Exception) -> bool:
    """Whether a message says all that is needed: of a UserError, or of kernels that were asked for and cannot be had."""
    kernels = sys.modules.get("students.kernels")  # not imported for its own sake: --help should be quick
    return isinstance(error, UserError | getattr(kernels, "BackendError", UserError))
