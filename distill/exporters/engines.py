"""The engines that run exports, by name, and the Python interpreters of engines that have their own environment."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distill.errors import UserError, nearest

ENGINES = ("transformers", "vllm", "llama.cpp", "mlx")
VARIABLE = "DISTILL_ENGINES"  # an environment variable: NAME=PYTHON entries, joined by semicolons


@dataclass(frozen=True)
class Preparation:
    """What an engine needs in its environment before it runs an export: a sentence with the reason, and the command."""

    reason: str
    command: str

    def __str__(self) -> str:
        return f"{self.reason}; run `{self.command}` in its environment first"


def pythons(given: Mapping[str, str]) -> dict[str, str]:
    """Return the Python interpreter of each engine with its own environment, from DISTILL_ENGINES and `given`.

    An entry of `given` replaces one of DISTILL_ENGINES.

    Raises:
        UserError: an engine's name is unknown, or its Python is not a program.
    """
    named = parsed(filter(None, os.environ.get(VARIABLE, "").split(";")), VARIABLE)
    for name, python in {**named, **given}.items():
        where = "--engine" if name in given else VARIABLE
        if name not in ENGINES:
            raise UserError(f"{where} names the engine {name!r}; {nearest(name, ENGINES)}")
        if shutil.which(os.path.expanduser(python)) is None:
            raise UserError(
                f"{where} gives {python} as the Python of {name}, but it is not a program; name the Python of its "
                f"environment, such as {name}=/path/to/environment/bin/python"
            )
    return {name: os.path.expanduser(python) for name, python in {**named, **given}.items()}


def parsed(entries: Iterable[str], where: str = "--engine") -> dict[str, str]:
    """Parse NAME=PYTHON entries into a dictionary from name to Python.

    Raises:
        UserError: an entry has another form, or two entries of one name differ.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, python = (part.strip() for part in entry.partition("="))
        if not (name and equals and python):
            raise UserError(
                f"{where} is {entry!r}; it should read NAME=PYTHON, such as vllm=/path/to/environment/bin/python"
            )
        if found.get(name, python) != python:
            raise UserError(f"{where} names {name} twice, with {found[name]} and {python}; keep one")
        found[name] = python
    return found
