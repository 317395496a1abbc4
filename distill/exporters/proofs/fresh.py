"""Scripts in processes of their own: what they are given, what they say meanwhile, and how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from distill.errors import UserError
from distill.exporters.proofs.installed import Installed, foreign

HERE = Path(__file__).parent
WATCHED = HERE / "watched.py"
ROOT = HERE.parents[2]  # what has to be on the path for `import students`
WHOSE = re.compile(r"^(?:\[rank\d+\]:|\(\w+ pid=\d+\)) *")  # what torch and vLLM put in front of a process's lines
RAISED = re.compile(r"(?!Exception ignored)[\w.]*(Error|Exception|Failure)\b")
MEMORY = ("MemoryError", "out of memory", "Cannot allocate memory", "not enough memory", "bad_alloc")


@dataclass(frozen=True)
class Place:
    """A folder for jobs and answers, and who is told how far they are."""

    folder: Path
    say: Callable[[str], None]

    def script(self, name: str) -> Path:
        """A script of this folder, copied to where nothing else lies: a Python looks for modules beside its script first."""
        return self._copied(HERE / f"{name}.py")

    def job(self, name: str, entries: dict) -> Path:
        """Write a job; its answer's folder has its name."""
        (self.folder / name).mkdir()
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(entries | {"out": str(self.folder / name)}))
        return path

    def run(self, script: str, job: Path, engine: str, where: Installed, *, ours: bool = False) -> None:
        """Run a script to its end.

        Args:
            engine: as messages call it. ours: whether it may import this project.

        Raises:
            UserError: it failed, with the last that it said.
        """
        variables = dict(os.environ) if where.own else foreign(os.environ)
        if ours:
            variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables |= {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(self.folder / "modules"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        said = self.folder / f"{job.stem}.log"
        scripts = [str(self._copied(WATCHED)), str(self.script(script))]
        with (
            said.open("w") as log,
            _without_spaces(where.python) as python,
            _started([python, *scripts, str(job)], variables, log) as process,
        ):
            for line in cast(IO[str], process.stdout):
                if line.startswith("# "):
                    self.say(f"{engine}: {line[2:].strip()}")
        if process.returncode:
            raise UserError(_failed(engine, process.returncode, said))

    def _copied(self, file: Path) -> Path:
        copy = self.folder / "scripts" / file.stem / f"{file.stem}_proof.py"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        return copy


@contextmanager
def place(written: Path, say: Callable[[str], None]) -> Iterator[Place]:
    """A folder beside an export, on the disk that has room for it; it goes when the block ends. Should this process be
    killed, the next export there sweeps it away."""
    folder = Path(tempfile.mkdtemp(prefix=f".proof.{os.getpid()}.", suffix="~", dir=written.parent)).absolute()
    try:
        yield Place(folder, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_spaces(python: str) -> Iterator[str]:
    """A Python by a path without spaces. torch.compile, which vLLM uses, builds no C++ where torch's own path has one."""
    path = Path(python)
    if " " not in python or path.parent.name != "bin":
        yield python
        return
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        link = Path(folder) / "environment"
        link.symlink_to(path.parent.parent, target_is_directory=True)
        yield str(link / "bin" / path.name)


@contextmanager
def _started(command: list[str], variables: dict[str, str], log) -> Iterator[subprocess.Popen]:
    """A process that ends with the block at the latest."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # its end is this process's
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        errors="replace",
        env=variables,
        cwd=Path(command[1]).parent,
    )
    try:
        with cast(IO[str], process.stdin), cast(IO[str], process.stdout):
            yield process
            process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _failed(engine: str, code: int, said: Path) -> str:
    """What a script that failed is said to have failed of: its last lines, or the memory."""
    lines = [WHOSE.sub("", line).strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    last = _last(lines)
    if code in (-signal.SIGKILL, 137) or any(word in line for word in MEMORY for line in lines[-30:]):
        return (
            f"{engine} cannot hold this export in memory here ({last if code > 0 else 'the system ended it'}); prove it on "
            "a machine with more memory, or leave the proof out with --no-verify"
        )
    return f"{engine} does not run this export: {last} (exit code {code}); --no-verify leaves the proof out"


def _last(lines: list[str]) -> str:
    """What Python said last that names an error, with the two lines behind it; the last line where none does."""
    named = [number for number, line in enumerate(lines) if RAISED.match(line)]
    return " ".join(lines[named[-1] : named[-1] + 3]) if named else (lines or ["nothing"])[-1]
