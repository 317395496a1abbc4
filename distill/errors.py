"""The exceptions that end a command in one message, that the user can mend or asked for, and how messages are rendered."""

import os
import re
import sys

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


def nearest(word: str, known) -> str:
    """`; did you mean X?` where a known word is near, else the list of them."""
    from difflib import get_close_matches

    known = sorted(str(item) for item in known)
    close = get_close_matches(str(word)[:100], known, n=1, cutoff=0.6)  # the time grows with the word's length
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
