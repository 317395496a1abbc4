"""Scripts in fresh processes: the environment that they run in, their lines of progress, and their errors."""

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
WHOSE = re.compile(r"^(?:\[rank\d+\]:|\(\w+ pid=\d+\)) *")  # what torch and vLLM write before a process's lines
RAISED = re.compile(r"(?!Exception ignored)[\w.]*(Error|Exception|Failure)\b")
MEMORY = ("MemoryError", "out of memory", "Cannot allocate memory", "not enough memory", "bad_alloc")


@dataclass(frozen=True)
class Place:
    """A folder for jobs and answers. say: called with each line of progress."""

    folder: Path
    say: Callable[[str], None]

    def script(self, name: str) -> Path:
        """Copy a script into a folder of its own: Python looks for modules next to the script first."""
        return self._copied(HERE / f"{name}.py")

    def job(self, name: str, entries: dict) -> Path:
        """Write a job, and make the folder of its answer, which has the job's name."""
        (self.folder / name).mkdir()
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(entries | {"out": str(self.folder / name)}))
        return path

    def run(self, script: str, job: Path, engine: str, where: Installed, *, ours: bool = False) -> None:
        """Run a script to its end.

        Args:
            engine: its name in messages. ours: whether the script may import this project.

        Raises:
            UserError: the script failed; the message holds its last error.
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
    """Make a temporary folder next to an export, on the same disk, and delete it when the block ends.

    If this process is killed, the next export there deletes the folder.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".proof.{os.getpid()}.", suffix="~", dir=written.parent)).absolute()
    try:
        yield Place(folder, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_spaces(python: str) -> Iterator[str]:
    """Yield a path without spaces to a Python: torch.compile, which vLLM uses, builds no C++ if torch's path has one."""
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
    """Start a process, and kill it if it still runs when the block ends."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # it is closed when this process ends
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
    """Explain why a script failed: lack of memory, or its last error."""
    lines = [WHOSE.sub("", line).strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    last = _last(lines)
    if code in (-signal.SIGKILL, 137) or any(word in line for word in MEMORY for line in lines[-30:]):
        return (
            f"{engine} cannot hold this export in memory here ({last if code > 0 else 'the system killed it'}); prove it on "
            "a machine with more memory, or leave the proof out with --no-verify"
        )
    return f"{engine} does not run this export: {last} (exit code {code}); --no-verify leaves the proof out"


def _last(lines: list[str]) -> str:
    """Return the last line that names an error with the two lines after it, or the last line if none names one."""
    named = [number for number, line in enumerate(lines) if RAISED.match(line)]
    return " ".join(lines[named[-1] : named[-1] + 3]) if named else (lines or ["nothing"])[-1]
