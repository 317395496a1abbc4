"""Breaches made on purpose: a rule that does not see them proves nothing."""

import os
import sys
import time
from pathlib import Path

from tests.fuzz import forked, rule


def _refuse(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def _grow() -> None:
    held = []
    while True:
        held.append(bytearray(os.urandom(1)) * (1 << 22))


def _write(place: str) -> None:
    with open(place, "w") as file:
        file.write("x")


def _compute() -> None:
    while True:
        pass


def _raise() -> None:
    raise TypeError("'NoneType' object is not iterable")


# what the rule should say, and of what
CONTROLS = {
    "traceback": _raise,
    "hangs": _compute,
    "memory without bound": _grow,
    "killed by a signal": os.abort,
    "writes elsewhere": lambda: _write(f"/tmp/.fuzz-control-{os.getpid()}"),
    "panic": lambda: _refuse("thread '<unnamed>' panicked at src/lib.rs\nerror: x is damaged"),
    "escape bytes": lambda: _refuse("error: there is no \x1b[31mred"),
    "no reason": lambda: _refuse("error: run.json cannot be read: ; mend it"),
    "Python's words": lambda: _refuse("error: run.json is damaged: 'int' object is not subscriptable"),
    "not one message": lambda: _refuse("error: one thing\nerror: and another"),
    "endless message": lambda: _refuse("error: " + "x" * 5000),
    "": lambda: _refuse("error: run.json is damaged at line 3; delete it"),
}


def missed(folder: Path) -> list[str]:
    """The controls of which the rule does not say what it should."""
    wrong, limits = [], (forked.SECONDS, forked.MEMORY)
    for expected, work in CONTROLS.items():
        forked.SECONDS, forked.MEMORY = (1.0, 64 << 20)
        outcome = forked.call(work, folder)
        found = rule.judge(outcome, ["run"])
        if [one.what for one in found] != ([expected] if expected else []):
            wrong.append(f"{expected or 'a clear message'}: {found}")
        for path in filter(os.path.exists, outcome.wrote):
            os.unlink(path)
    forked.SECONDS, forked.MEMORY = limits
    return wrong + _waiting(folder)


def _waiting(folder: Path) -> list[str]:
    """What waits and computes nothing is ended by the clock."""
    patience, forked.PATIENCE = forked.PATIENCE, 1.0
    found = rule.judge(forked.call(lambda: time.sleep(600), folder), ["run"])
    forked.PATIENCE = patience
    return [] if [one.what for one in found] == ["hangs"] else [f"hangs, waiting: {found}"]
