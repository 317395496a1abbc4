"""The engines that an export is proved in, by name, and where those that live in an environment of their own are."""

import os
import shutil
from collections.abc import Iterable, Mapping

from distill.errors import UserError, nearest

ENGINES = ("transformers", "vllm", "llama.cpp", "mlx")
VARIABLE = "DISTILL_ENGINES"  # NAME=PYTHON, several joined by semicolons


def pythons(given: Mapping[str, str]) -> dict[str, str]:
    """The Python of every engine that has one of its own: those given, and those that the environment names.

    Raises:
        UserError: there is no such engine, or the Python is no program.
    """
    named = parsed(filter(None, os.environ.get(VARIABLE, "").split(";")), VARIABLE)
    for name, python in {**named, **given}.items():
        where = "--engine" if name in given else VARIABLE
        if name not in ENGINES:
            raise UserError(f"{where} names the engine {name!r}; {nearest(name, ENGINES)}")
        if shutil.which(os.path.expanduser(python)) is None:
            raise UserError(
                f"{where} says that {name} is in {python}, which is no program; name the Python of its environment, such as "
                f"{name}=/path/to/environment/bin/python"
            )
    return {name: os.path.expanduser(python) for name, python in {**named, **given}.items()}


def parsed(entries: Iterable[str], where: str = "--engine") -> dict[str, str]:
    """NAME=PYTHON, by name.

    Raises:
        UserError: one reads otherwise, or a name stands twice.
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
