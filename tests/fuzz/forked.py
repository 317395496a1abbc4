"""One command of ours in a forked child: what it printed, how it ended, and what it should not have done on the way.

The parent has imported everything and computed nothing, so a child begins in milliseconds. A limit on processor time ends
what hangs, a watchdog on resident memory what grows; faulthandler says where each was.
"""

import ctypes
import faulthandler
import gc
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("distill", "students", "teachers")
SECONDS = 30.0  # of processor time; the longest command of the place takes three
PATIENCE = 60.0  # seconds on the clock in which nothing is computed at all: it waits for what never comes
DIE_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG
MEMORY = 2 << 30  # bytes beyond the parent's
FOREIGN = ("accelerate", "datasets", "gguf", "peft", "pyarrow.parquet", "torch", "transformers.models.llama.modeling_llama")


@dataclass
class Outcome:
    """How a command ended. code: its exit status, minus a signal's number. stopped: "time" or "memory" where the watchdog
    ended it. error: type, message and frames of the exception that ended it. wrote: files opened for writing outside."""

    code: int
    output: str
    said: str
    stopped: str | None = None
    error: dict | None = None
    wrote: list[str] = field(default_factory=list)
    seconds: float = 0.0


def preload() -> None:
    """Import what children need, and keep torch to one thread; nothing is computed."""
    import importlib
    import pkgutil

    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "400"}
    sys.dont_write_bytecode = True  # children would seem to write elsewhere
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1"}
    for name in FOREIGN:
        importlib.import_module(name)
    for package in OURS:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.endswith("__main__") and ".engines" not in module.name:
                with suppress(ImportError):  # of a library that is an extra
                    importlib.import_module(module.name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # children share what they never change


def call(work, folder: Path, answers: str = "") -> Outcome:
    """Call a function in a child whose working directory, home and caches lie in `folder`. answers: what the terminal on its
    standard input types."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        notes = Path(scratch)
        master, terminal = os.openpty() if answers else (None, os.open(os.devnull, os.O_RDONLY))
        began = _resident(os.getpid())
        child = os.fork()
        if child == 0:
            _as_child(work, folder, notes, terminal)
        if master is not None:
            os.write(master, answers.encode())
        stopped, status = _watch(child, began)
        for handle in filter(None, (master, terminal)):
            os.close(handle)
        return _outcome(notes, stopped, status)


def command(arguments: list[str]):
    """The work of a command line."""

    def work() -> None:
        from distill import cli

        sys.argv = ["distill", *arguments]
        cli.entry()

    return work


def _as_child(work, folder: Path, notes: Path, terminal: int) -> None:
    code, error = 70, None
    wrote: list[str] = []
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # without the watchdog it would grow on
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(terminal, 0)
        for name, handle in (("out", 1), ("err", 2)):
            os.dup2(os.open(notes / name, os.O_CREAT | os.O_WRONLY, 0o600), handle)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
        crashes = os.fdopen(os.open(notes / "stacks", os.O_CREAT | os.O_WRONLY, 0o600), "w")
        faulthandler.enable(crashes)
        faulthandler.register(signal.SIGUSR1, crashes)
        _settle(folder)
        sys.addaudithook(_noting(str(folder), str(notes), wrote))
        try:
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else (0 if ended.code is None else 1)
            error = described(ended.__context__) if ended.__context__ else None
        except BaseException as raised:
            code, error = 1, described(raised)
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        try:
            (notes / "ended").write_text(json.dumps({"code": code, "error": error, "wrote": wrote[:20]}))
        finally:
            os._exit(code & 0xFF)


def _settle(folder: Path) -> None:
    for name in ("home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "DISTILL_CACHE": str(folder / "cache")}
    tempfile.tempdir = None
    import datasets
    import huggingface_hub
    import transformers.dynamic_module_utils as modules

    datasets.config.HF_DATASETS_CACHE = folder / "home" / "datasets"
    huggingface_hub.constants.HF_HUB_CACHE = str(folder / "home" / "hub")
    modules.HF_MODULES_CACHE = str(folder / "home" / "modules")
    os.chdir(folder)


def _noting(folder: str, notes: str, wrote: list[str]):
    """An audit hook that notes files opened for writing elsewhere, and programs started."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes) and (arguments[2] or 0) & writing:
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith((folder, notes, "/dev/", "/proc/")):
                wrote.append(path)
        elif event in ("os.system", "os.exec", "subprocess.Popen", "os.posix_spawn"):
            told = str(arguments[0])
            if not told.endswith(("ldconfig", "uname", "lscpu")) and not _this_python(told):  # exports are proved by it
                wrote.append(f"program {told}")

    return hook


def _this_python(program: str) -> bool:
    """Whether a program is the running Python, perhaps called through a link to the folder of its environment."""
    folder, name = os.path.split(program)
    own, own_name = os.path.split(sys.executable)
    return name == own_name and os.path.realpath(folder) == os.path.realpath(own)


def described(error: BaseException) -> dict:
    """An exception as data: its type, message, our innermost frame, the innermost of all, and what caused it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _ours(frame.filename)]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return {
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "frame": _called(ours[-1].filename, ours[-1].name) if ours else "",
        "deepest": _called(frames[-1].filename, frames[-1].name) if frames else "",
        "cause": described(cause) if cause is not None and cause is not error else None,
    }


def _ours(path: str) -> bool:
    return any(path.startswith(f"{ROOT / package}{os.sep}") for package in OURS)


def _called(path: str, function: str) -> str:
    for start in (f"{ROOT}{os.sep}", f"{sys.prefix}{os.sep}"):
        path = path.removeprefix(start)
    return f"{path.partition('site-packages/')[2] or path}:{function}"


def _watch(child: int, began: int) -> tuple[str | None, int]:
    """Wait for a child, and end it where it hangs or grows. The reason, and its status."""
    moved, known, stopped = time.monotonic(), 0.0, None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return stopped, status
        if stopped is None:
            taken = _cpu(child)
            if taken > known:
                moved, known = time.monotonic(), taken
            late = taken > SECONDS or time.monotonic() - moved > PATIENCE
            stopped = "time" if late else "memory" if _resident(child) - began > MEMORY else None
            if stopped:
                os.kill(child, signal.SIGUSR1)
                time.sleep(0.3)
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _cpu(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def _outcome(notes: Path, stopped: str | None, status: int) -> Outcome:
    out, err, stacks = (_text(notes / name) for name in ("out", "err", "stacks"))
    try:
        ended = json.loads((notes / "ended").read_text())
    except (OSError, ValueError):
        ended = {"code": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else 70, "error": None, "wrote": []}
    if (stopped or ended["code"] < 0) and ended["error"] is None:
        ended["error"] = _of_stacks(stacks)
    return Outcome(ended["code"], out, err, stopped, ended["error"], ended["wrote"])


def _of_stacks(stacks: str) -> dict:
    """Where faulthandler found the thread that was at work: the innermost call first."""
    thread = re.split(r"\n(?=Thread |Current thread )", f"\n{stacks}")
    calls = [re.findall(r'File "(.+?)", line \d+ in (\S+)', part) for part in thread]
    ours = next(((path, name) for part in calls for path, name in part if _ours(path)), None)
    deepest = next((part[0] for part in calls if part), None)
    return {
        "type": "",
        "message": "",
        "frame": _called(*ours) if ours else "",
        "deepest": _called(*deepest) if deepest else "",
        "cause": None,
    }


def _text(path: Path) -> str:
    return path.read_bytes()[: 1 << 20].decode("utf-8", "backslashreplace") if path.exists() else ""
