"""Quantised GGUF files: the program that makes them, its failures, and what stays."""

import sys

import pytest

from distill.errors import UserError
from distill.exporters.gguf_files import quantising
from distill.exporters.target import Form
from tests.distill.gguf_students import STUDENTS, exported

PROGRAM = """#!/bin/sh
"exec" "{python}" "$0" "$@"
import shutil, sys
source, wanted, name = sys.argv[1:]
if name != "Q8_0":
    sys.exit("this one makes Q8_0 alone")
shutil.copyfile(source, wanted)
"""


@pytest.fixture
def quantiser(tmp_path, monkeypatch):
    """A program of the quantiser's name that copies, and no library."""
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_only_the_quantised_file_stays(quantiser, tokenizer, tmp_path):
    _, path = exported(tmp_path, tokenizer, *STUDENTS["zamba"][0], Form(quantize="q8_0"))
    assert path.name == "a-run-Q8_0.gguf"


def test_a_quantiser_that_fails_is_quoted(quantiser, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"did not make q4_k_m of a-run-F16\.gguf: this one makes Q8_0 alone"):
        exported(tmp_path, tokenizer, *STUDENTS["zamba"][0], Form(quantize="q4_k_m"))


def test_the_engine_that_is_named_quantises(quantiser, monkeypatch, tmp_path):
    monkeypatch.setattr(quantising, "_has_library", lambda python: python == "/there/python")
    assert quantising.command(tmp_path, tmp_path, "q8_0", "/there/python")[0] == "/there/python"
    assert quantising.command(tmp_path, tmp_path, "q8_0")[0] != "/there/python"


def test_without_a_quantiser_nothing_is_written(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"--quantize q8_0 needs llama.cpp's quantiser.*pip install llama-cpp-python"):
        exported(tmp_path, tokenizer, *STUDENTS["zamba"][0], Form(quantize="q8_0"))
    assert not (tmp_path / "gguf").exists()
