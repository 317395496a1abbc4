"""The cache of prepared data and converted checkpoints: one process makes an entry, others wait, none sees it unfinished.

$DISTILL_CACHE/KIND/NAME is filled under a temporary name in the same folder and then renamed. The process that makes it
holds a lock in `locks/`. The system releases the lock if the process dies, and the next process that makes an entry removes
the leftovers. For entries made in parts, finished parts stay, and the next process continues after them.
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

MAKING = ".making-"  # prefix of an entry's temporary folder; random letters follow the entry's name
UNFINISHED = ".unfinished-"  # prefix of the folder of an entry made in parts; the next attempt continues it
EARLIER = (".preparing-", ".converting-")  # prefixes of earlier versions, without a lock that shows whether one is in use
STALE = 7 * 24 * 3600.0  # a temporary folder whose lock is not free is a leftover after this many seconds without a change
ABANDONED = 30 * 24 * 3600.0  # unfinished parts that no process continues are removed after this many seconds
ELSEWHERE = "make room or give the right to write there, or set DISTILL_CACHE to a folder of your own"


class CacheError(ValueError):
    """The cache cannot be read or written; the message names the folder, the reason and the setting."""


def cache_folder() -> Path:
    """Returns the cache folder: $DISTILL_CACHE, else ~/.cache/distill.

    Raises:
        CacheError: DISTILL_CACHE is not set and the user has no home folder, or it names a home folder that does not exist.
    """
    given = os.environ.get("DISTILL_CACHE", "").strip()
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "distill"
    except RuntimeError as error:
        said = f"DISTILL_CACHE is {given}" if given else "the user has none and HOME is not set"
        raise CacheError(f"there is no home folder to keep the cache in ({said}); set DISTILL_CACHE to a folder") from error


def once(kind: str, name: str, make: Callable[[Path], None], what: str) -> Path:
    """Returns the folder KIND/NAME of the cache, made on first use.

    Args:
        make: fills the folder that it is passed. what: name of the entry in the message of a process that waits for another.

    Raises:
        CacheError: the cache cannot be read or written. Errors of `make` pass through; its folder is removed.
    """
    return _once(kind, name, make, what, is_there, _made_anew)


def in_parts(kind: str, name: str, make: Callable[[Path], None], what: str, whole: Callable[[Path], bool]) -> Path:
    """Returns the folder KIND/NAME of the cache, made in parts: a failed attempt is continued, missing parts are made again.

    Args:
        make: fills the folder that it is passed, part by part, and continues after the parts that are there. what: as in
            `once`. whole: returns whether a folder has all its parts.

    Raises:
        CacheError: the cache cannot be read or written. Errors of `make` pass through; finished parts stay.
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
    """Fill a folder under a temporary name and rename it; on an error it is removed."""
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
    """Continue a folder under a temporary name and rename it when it is whole.

    Without a lock two processes may work at the same time, so each makes a folder of its own.
    """
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
    """Returns whether a folder has finished parts: subfolders named by their number."""
    return any(path.name.isdigit() for path in folder.iterdir())


def is_there(target: Path) -> bool:
    """Returns whether a folder of the cache exists.

    Raises:
        CacheError: it cannot be read, or is not a folder.
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
    """Turn errors of a full or read-only disk, or one of another user, inside the block into CacheError.

    Raises:
        CacheError: naming the path, the system's reason and the setting.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CacheError(_refusal(place, "written", error)) from error


def _refusal(place: Path, verb: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"the cache {place} cannot be {verb}: {reason}{_owner(place)}; {ELSEWHERE}"


def _owner(place: Path) -> str:
    """Returns the owner of the first existing folder among `place` and its parents, if it is another user; else ""."""
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
        if not target.exists():  # otherwise a process without a lock was faster, with the same result
            raise


def _lock(target: Path) -> FileLock:
    return FileLock(target.parent.parent / "locks" / f"{target.parent.name}-{target.name}.lock", mode=0o666)


@contextmanager
def _alone(target: Path, what: str) -> Iterator[bool]:
    """Hold the target's lock while the block runs; wait for another process if necessary. Yields whether a lock is held.

    On disks without locks, or if another user made the lock file, no lock is held. Two processes may then make the same
    entry, and the first to finish wins.
    """
    lock = _lock(target)
    owner = Path(lock.lock_file).with_suffix(".owner")
    try:
        owner.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"{what}: {_read(owner) or 'another process'} is making {target}; waiting for it")
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
    """Remove what killed processes left in the target's folder. locked: whether this process holds the target's lock."""
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
    """Returns whether no process holds the target's lock."""
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
