"""Rendering of chat templates within limits on time and memory; a template is a program by a tokenizer's publisher."""

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

SECONDS, MEMORY = 10, 2**30  # limits of a template in seconds and bytes; published ones take milliseconds
LONGEST = 2**24  # bytes of a rendered chat


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], where: str, *, answer: bool = False) -> str:
    """Render a chat with its tokenizer's template.

    Args:
        turns: mappings with "role" and "content". where: the tokenizer's place, for the message. answer: also open the
            assistant's turn.

    Raises:
        UserError: the template fails, takes too long, or writes too much.
    """

    def work() -> str:
        return cast(Any, tokenizer).apply_chat_template(turns, add_generation_prompt=answer, tokenize=False)

    return limited(work, where, "correct it, or leave out --chat")


def limited(work: Callable[[], str], where: str, fix: str) -> str:
    """Call `work`, which uses a chat template, within the limits on time and memory. Returns its text.

    Args:
        where: the tokenizer's place, and fix: what to do, for the message.

    Raises:
        UserError: it fails, takes too long, or writes too much.
    """
    said, reason = _limited(work) if hasattr(os, "fork") else _tried(work)
    if reason is not None:
        raise UserError(f"the chat template of {where} {plain(reason)}; {fix}")
    return said


def _tried(work) -> tuple[str, str | None]:
    """A template's text, or the reason why it failed."""
    try:
        return str(work()), None
    except MemoryError:
        return "", f"needs more than {MEMORY / 2**30:g} GiB of memory"
    except RecursionError:
        return "", "calls itself without end"
    except Exception as error:  # a template may raise anything
        said = " ".join(str(error).split())[:200]
        return "", f"fails: {said}" if said else "fails without a reason"


def _limited(work) -> tuple[str, str | None]:
    """As `_tried`, in a child process, which can be killed while it loops or builds a string of 10 GB."""
    reads, writes = os.pipe()
    with no_panics():  # tokenizers warns on the standard error that it was forked
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
        return "", f"did not end within {SECONDS} seconds"
    if len(found) > LONGEST:
        return "", f"writes more than {LONGEST:,} bytes"
    if not found:
        return "", f"was killed by the system: it may need more than {MEMORY / 2**30:g} GiB of memory"
    text = found[1:].decode("utf-8", errors="replace")
    return (text, None) if found[:1] == b"+" else ("", text)


def _in_child(work, reads: int, writes: int) -> None:
    """Send a plus and the template's text through the pipe, or a minus and the reason why it failed."""
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
    """Read the pipe up to a little over LONGEST bytes; None if it does not end in time."""
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
