"""The cache: what can be made again, made by one process while others wait for it, and never seen half made.

$DISTILL_CACHE/KIND/NAME is filled under a temporary name beside its place and renamed. Who makes it holds a lock in
`locks/`, which the system takes from a process that dies: what such a process left is removed by the next one that makes
anything. Of what is made in parts, those that are whole stay, and the next process goes on behind them.
"""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

MAKING = ".making-"  # before the name of what is made, and further letters
UNFINISHED = ".unfinished-"  # before the name of what is made in parts: whoever makes it goes on with them
EARLIER = (".preparing-", ".converting-")  # what earlier versions called it; no lock tells whether one is alive
STALE = 7 * 24 * 3600.0  # seconds without a change after which what no lock speaks for is left over
ABANDONED = 30 * 24 * 3600.0  # and after which parts are, that nobody goes on with
ELSEWHERE = "make room or give the right to write there, or set DISTILL_CACHE to a folder of your own"


class CacheError(ValueError):
    """The cache cannot be read or written; the message names the folder, the reason and the setting."""


def cache_folder() -> Path:
    """Where what can be made again is kept: $DISTILL_CACHE, else ~/.cache/distill.

    Raises:
        CacheError: neither names a folder.
    """
    given = os.environ.get("DISTILL_CACHE", "").strip()
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "distill"
    except RuntimeError as error:
        said = f"DISTILL_CACHE is {given}" if given else "the user has none and HOME is not set"
        raise CacheError(f"there is no home folder to keep the cache in ({said}); set DISTILL_CACHE to a folder") from error


def once(kind: str, name: str, make: Callable[[Path], None], what: str) -> Path:
    """The folder KIND/NAME of the cache, made on first use.

    Args:
        make: fills the folder that it is given. what: what it makes, for the message of who waits for another process.

    Raises:
        CacheError: the cache cannot be read or written. Also whatever `make` raises; nothing is left of it then.
    """
    return _once(kind, name, make, what, is_there, _made_anew)


def in_parts(kind: str, name: str, make: Callable[[Path], None], what: str, whole: Callable[[Path], bool]) -> Path:
    """As `once`, of what is made in parts: a folder of parts that an attempt left is given to the next one, and a folder of
    the cache that lost some is given to `make` again.

    Args:
        make: fills the folder that it is given, part by part, going on behind those that are there. whole: whether nothing
            of a folder is missing.

    Raises:
        CacheError: the cache cannot be read or written. Also whatever `make` raises; parts that are whole stay then.
    """
    return _once(kind, name, make, what, lambda target: is_there(target) and whole(target), _made_further)


def _once(kind: str, name: str, make: Callable, what: str, there: Callable[[Path], bool], how: Callable) -> Path:
    target = cache_folder() / kind / name
    if there(target):
        return target
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target, what) as locked:
        if there(target):  # another process was faster
            return target
        _remove_leftovers(target, locked)
        how(target, make, locked)
    return target


def _made_anew(target: Path, make: Callable[[Path], None], locked: bool) -> None:
    """A folder filled under another name, which nothing is left of unless it becomes whole."""
    with writing(target.parent):
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{MAKING}{target.name}-"))
    try:
        make(scratch)
        with writing(target.parent):
            scratch.chmod(0o777 & ~_umask())  # mkdtemp keeps it to one user
            _move(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _made_further(target: Path, make: Callable[[Path], None], locked: bool) -> None:
    """A folder gone on with, under another name until it is whole. Without a lock two processes may be at it, and each makes
    its own."""
    if not locked:
        return _made_anew(target, make, locked)
    if is_there(target):
        return make(target)
    scratch = target.with_name(f"{UNFINISHED}{target.name}")
    with writing(target.parent):
        scratch.mkdir(exist_ok=True)
    try:
        make(scratch)
        with writing(target.parent):
            _move(scratch, target)
    finally:
        if scratch.is_dir() and not _parts(scratch):
            shutil.rmtree(scratch, ignore_errors=True)


def _parts(folder: Path) -> bool:
    """Whether a folder has parts that are whole: folders named by their number."""
    return any(path.name.isdigit() for path in folder.iterdir())


def is_there(target: Path) -> bool:
    """Whether a folder of the cache is made.

    Raises:
        CacheError: it cannot be read, or nobody may look.
    """
    try:
        found = os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CacheError(_refusal(target, "read", error)) from error
    if not os.path.isdir(target):
        raise CacheError(f"{target} should be a folder of the cache, but is none; delete it")
    if not os.access(target, os.R_OK | os.X_OK):
        raise CacheError(_refusal(target, "read", PermissionError(13, f"its rights are {found.st_mode & 0o777:o}")))
    return True


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what a full, read-only or foreign disk raises inside the block into a message.

    Raises:
        CacheError: naming the place, the system's reason and the setting.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CacheError(_refusal(place, "written", error)) from error


def _refusal(place: Path, verb: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"the cache {place} cannot be {verb}: {reason}{_owner(place)}; {ELSEWHERE}"


def _owner(place: Path) -> str:
    """Whose the first folder is that is there, where it is another user's."""
    for folder in (place, *place.parents):
        try:
            user = folder.stat().st_uid
        except OSError:
            continue
        if not hasattr(os, "getuid") or user == os.getuid():
            return ""
        try:
            import pwd

            return f" ({folder} belongs to {pwd.getpwuid(user).pw_name})"
        except (ImportError, KeyError):
            return f" ({folder} belongs to user {user})"
    return ""


def _umask() -> int:
    before = os.umask(0o022)
    os.umask(before)
    return before


def _move(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not target.exists():  # otherwise a process that no lock could stop was faster, with the same result
            raise


def _lock(target: Path) -> FileLock:
    return FileLock(target.parent.parent / "locks" / f"{target.parent.name}-{target.name}.lock", mode=0o666)


@contextmanager
def _alone(target: Path, what: str) -> Iterator[bool]:
    """Hold the target's lock while the block runs, waiting for it if need be; gives whether there is one: on disks without
    locks, and where another user made the lock, both may make the same, and the first to end is taken."""
    lock = _lock(target)
    owner = Path(lock.lock_file).with_suffix(".owner")
    try:
        owner.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"{what}: {_read(owner) or 'another process'} makes {target}; waiting for it")
            lock.acquire(poll_interval=0.2)
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        with suppress(OSError):
            owner.write_text(f"process {os.getpid()} on {platform.node()}")
        yield True
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _read(file: Path) -> str:
    try:
        return file.read_text()[:200]
    except (OSError, ValueError):
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _remove_leftovers(target: Path, locked: bool) -> None:
    """Take away what killed processes left beside a target whose lock is held, if `locked`."""
    for path in target.parent.iterdir():
        if path.name.startswith(MAKING):
            name = path.name.removeprefix(MAKING).rpartition("-")[0]
            left = locked if name == target.name else _is_free(target.with_name(name))
            if left or _age(path) > STALE:
                shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(EARLIER) and _age(path) > STALE:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(UNFINISHED) and path.name != UNFINISHED + target.name:
            left = _age(path) > ABANDONED or not _parts(path)
            if left and _is_free(target.with_name(path.name.removeprefix(UNFINISHED))):
                shutil.rmtree(path, ignore_errors=True)


def _is_free(target: Path) -> bool:
    """Whether nobody makes a target."""
    lock = _lock(target)
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
