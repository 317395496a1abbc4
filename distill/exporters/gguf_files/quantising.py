"""Quantisation of a GGUF file by llama.cpp's own quantiser, in a separate process because the quantiser aborts on errors."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from distill.errors import UserError
from distill.exporters.engines import pythons
from distill.exporters.proofs.installed import foreign

TYPES = {"q8_0": 7, "q4_k_m": 15}  # llama.cpp's numbers (llama_ftype)
PROGRAM = "llama-quantize"
BY_LIBRARY = """
import ctypes, sys
import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = int(sys.argv[3])
failed = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters))
raise SystemExit(1 if failed else 0)
"""
MISSING = (
    "--quantize {name} needs llama.cpp's quantiser, but llama-quantize is not on PATH and llama-cpp-python is not installed "
    "here; pip install llama-cpp-python, or name the Python that has it (--engine llama.cpp=/path/to/bin/python), "
    "or leave --quantize out and run llama-quantize on the file elsewhere"
)


def command(source: Path, target: Path, name: str, python: str | None = None) -> list[str]:
    """Return the command that quantises a file. python: a Python with llama.cpp to try first.

    Raises:
        UserError: there is no quantiser.
    """
    if python is not None and _has_library(python):
        return [python, "-c", BY_LIBRARY, str(source), str(target), str(TYPES[name])]
    if (program := shutil.which(PROGRAM)) is not None:
        return [program, str(source), str(target), name.upper()]
    if find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", BY_LIBRARY, str(source), str(target), str(TYPES[name])]
    if (python := pythons({}).get("llama.cpp")) is not None and _has_library(python):
        return [python, "-c", BY_LIBRARY, str(source), str(target), str(TYPES[name])]
    raise UserError(MISSING.format(name=name))


def _has_library(python: str) -> bool:
    done = subprocess.run([python, "-c", "import llama_cpp"], env=foreign(os.environ), capture_output=True, check=False)
    return done.returncode == 0


def quantise(source: Path, target: Path, name: str, python: str | None = None) -> None:
    """Quantise a file into another.

    Raises:
        UserError: there is no quantiser, or it failed; the message holds the last line of its output.
    """
    arguments = command(source, target, name, python)
    done = subprocess.run(
        arguments,
        env=dict(os.environ) if arguments[0] == sys.executable else foreign(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not target.exists():
        said = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        raise UserError(
            f"llama.cpp's quantiser did not make {name} of {source.name}: {said[-1] if said else 'no output'} (exit code "
            f"{done.returncode}); leave --quantize out to keep the float16 file"
        )
