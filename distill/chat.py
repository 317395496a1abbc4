"""Chat templates, which are programs of whoever published a tokenizer: rendered with a limit on time and memory."""

import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from teachers.checks import plain
from teachers.quiet import no_panics

SECONDS, MEMORY = 10, 2**30  # that a template may take; published ones take milliseconds
LONGEST = 2**24  # bytes of a rendered chat


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], where: str, *, answer: bool = False) -> str:
    """A chat as its tokenizer's template writes it.

    Args:
        turns: with "role" and "content". where: the tokenizer is, for the message. answer: open the assistant's turn too.

    Raises:
        UserError: the template fails, takes too long, or writes too much.
    """

    def work() -> str:
        return cast(Any, tokenizer).apply_chat_template(turns, add_generation_prompt=answer, tokenize=False)

    return limited(work, where, "mend it, or leave --chat out")


def limited(work: Callable[[], str], where: str, fix: str) -> str:
    """What a piece of work with a chat template gives, which may take so much time and memory and no more.

    Args:
        where: the tokenizer is, and fix: what to do, for the message.

    Raises:
        UserError: it fails, takes too long, or gives too much.
    """
    said, reason = _limited(work) if hasattr(os, "fork") else _tried(work)
    if reason is not None:
        raise UserError(f"the chat template of {where} {plain(reason)}; {fix}")
    return said


def _tried(work) -> tuple[str, str | None]:
    """What a template writes, or why it failed."""
    try:
        return str(work()), None
    except MemoryError:
        return "", f"needs more than {MEMORY / 2**30:g} GiB of memory"
    except RecursionError:
        return "", "calls itself without end"
    except Exception as error:  # a template may raise whatever it likes
        said = " ".join(str(error).split())[:200]
        return "", f"fails: {said}" if said else "fails without a reason"


def _limited(work) -> tuple[str, str | None]:
    """As `_tried`, in a child process: nothing else ends a loop, or a string of 10 GB."""
    reads, writes = os.pipe()
    with no_panics():  # tokenizers says on the standard error that it was forked
        child = os.fork()
        if not child:
            _in_child(work, reads, writes)
    os.close(writes)
    try:
        found = _read(reads)
    finally:
        os.close(reads)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if found is None:
        return "", f"had not ended after {SECONDS} seconds"
    if len(found) > LONGEST:
        return "", f"writes more than {LONGEST:,} bytes"
    if not found:
        return "", f"was ended by the system: it may need more than {MEMORY / 2**30:g} GiB of memory"
    text = found[1:].decode("utf-8", errors="replace")
    return (text, None) if found[:1] == b"+" else ("", text)


def _in_child(work, reads: int, writes: int) -> None:
    """Write what the template wrote, behind a plus, or why it failed, behind a minus."""
    with suppress(BaseException):
        import resource

        os.close(reads)
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    with suppress(BaseException):
        text, reason = _tried(work)
        with open(writes, "wb") as out:
            out.write(b"+" + text.encode("utf-8", errors="replace") if reason is None else b"-" + reason.encode())
    os._exit(0)


def _read(pipe: int) -> bytes | None:
    """Everything up to a bit more than the longest; None where it does not end in time."""
    import time

    end, found = time.monotonic() + SECONDS, bytearray()
    while len(found) <= LONGEST + 1:
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            return None
        part = os.read(pipe, 2**16)
        if not part:
            break
        found += part
    return bytes(found)
