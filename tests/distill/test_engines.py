"""The Pythons that engines run in: found, failing, called by a path without spaces, and ended with their caller."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.exporters.engines import ENGINES
from distill.exporters.proofs import SCRIPTS
from distill.exporters.proofs.bounds import BFLOAT16, BOUNDS
from distill.exporters.proofs.fresh import HERE, place
from distill.exporters.proofs.installed import MODULES, Installed, installed, too_old


def test_pythons_of_engines(tmp_path):
    assert installed("transformers", {}).own
    assert installed("transformers", {"transformers": sys.executable}).version == installed("transformers", {}).version
    with pytest.raises(UserError, match=r"the Python .*nowhere given for vllm does not start: No such file"):
        installed("vllm", {"vllm": str(tmp_path / "nowhere")})
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"python given for llama.cpp has no llama_cpp or xllamacpp; install it there"):
        installed("llama.cpp", {"llama.cpp": str(bare)})
    bare.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(UserError, match="given for mlx does not start: it does not answer as Python does"):
        installed("mlx", {"mlx": str(bare)})
    assert too_old("transformers", "5.17.0", "5.23") and not too_old("transformers", "5.23.1", "5.23")
    assert set(SCRIPTS) == set(ENGINES) == set(MODULES) == set(BOUNDS)
    assert all((HERE / f"{name}.py").is_file() for name in SCRIPTS.values() if name != "llama_cpp")
    assert {engine for engine, _ in BFLOAT16} <= set(ENGINES)


@pytest.mark.parametrize(
    ("script_text", "said"),
    [
        ("raise MemoryError('16 GiB')", "cannot hold this export in memory here .*more memory, or leave the proof out"),
        ("import os; os.kill(os.getpid(), 9)", "cannot hold this export in memory here .the system killed it"),
        (
            "raise SystemExit('[rank0]: a.b.CppError: ld\\n[rank0]: Set VERBOSE=1')",
            r"engine does not run this export: a.b.CppError: ld",
        ),
        ("raise ValueError('no such layer')", r"engine does not run this export: ValueError: no such layer \(exit code 1\)"),
    ],
    ids=["memory", "killed", "error of a process", "error"],
)
def test_an_engine_that_fails(script_text, said, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.exporters.proofs.fresh.HERE", tmp_path)
    (tmp_path / "engine.py").write_text(f"print('# working', flush=True)\n{script_text}\n")
    told = []
    with place(tmp_path / "out", told.append) as fresh:
        with pytest.raises(UserError, match=said):
            fresh.run("engine", fresh.job("job", {}), "engine", Installed(sys.executable, False, ""))
        assert Path(fresh.folder).is_dir()
    assert told == ["engine: working"] and not fresh.folder.exists()


def test_an_engine_is_called_by_a_path_without_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.exporters.proofs.fresh.HERE", tmp_path)
    (tmp_path / "engine.py").write_text("import sys; print('#', sys.argv[0], flush=True)\n")
    python = tmp_path / "an environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "# $0"\n')
    python.chmod(0o755)
    told = []
    with place(tmp_path / "out", told.append) as fresh:
        fresh.run("engine", fresh.job("job", {}), "engine", Installed(str(python), False, ""))
    assert told[0].endswith("/environment/bin/python") and " " not in told[0].removeprefix("engine: ")


def test_an_engine_does_not_outlive_who_started_it(tmp_path):
    """kill -9 of a proof: the engine's process ends too."""
    (tmp_path / "engine.py").write_text("import os, time\nprint('#', os.getpid(), flush=True)\ntime.sleep(600)\n")
    starter = f"""
import sys
from pathlib import Path
import distill.exporters.proofs.fresh as fresh
fresh.HERE = Path({str(tmp_path)!r})
with fresh.place(Path({str(tmp_path / "out")!r}), lambda line: print(line, flush=True)) as made:
    made.run("engine", made.job("job", {{}}), "engine", fresh.Installed(sys.executable, False, ""))
"""
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as process:
        engine = int(process.stdout.readline().split()[-1])
        process.kill()
    for _ in range(600):
        try:
            os.kill(engine, 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[0]:
            return  # nobody waits for it
        time.sleep(0.1)
    os.kill(engine, 9)
    pytest.fail("the engine's process went on")
