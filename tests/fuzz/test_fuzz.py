"""What `make test` takes of the fuzzer: breaches made on purpose, some of the corpus, a seed. `make test-fuzz` goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTED = {
    "the corpus": ["--controls", "--sample", "30", "corpus"],
    "a seed": ["1"],
}


@pytest.mark.parametrize("what", TESTED)
def test_nothing_ends_in_a_traceback_or_is_damaged(what):
    """In a process of its own, which forks before it computes anything."""
    command = [sys.executable, "-m", "tests.fuzz", "--quiet", *TESTED[what]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-3000:]}"
    assert "no causes of findings" in done.stdout and "could not be done" not in done.stderr


def test_a_seed_draws_the_same_cases_again():
    from tests.fuzz.draws import KINDS, cases_of

    class Nothing:
        """Trees of a place that was not made."""

        def nodes(self, file):
            return [[], ["a"], ["a", 0], ["b"]]

        header = nodes

        def entries(self):
            return [["general.architecture", 8, "llama"]]

    first, again = ([case.text() for case in cases_of(seed, Nothing())] for seed in (5, 5))
    assert first == again and len(first) > 10
    assert first != [case.text() for case in cases_of(6, Nothing())]
    drawn = {case.kind for seed in range(8) for case in cases_of(seed, Nothing())}
    assert drawn >= set(KINDS)


def test_gguf_files_as_data_and_back(tmp_path):
    from tests.fuzz import gguf_raw, place

    place.small_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    assert gguf_raw.write(gguf_raw.read(data)) == data
