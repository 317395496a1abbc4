"""The cache on machines that others use too: folders of other users, full disks, two processes at once, and killed ones."""

import errno
import os
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from teachers import cache
from teachers.cache import CacheError, cache_folder, once
from tests.small_disks import small_disk_at

pytestmark = pytest.mark.usefixtures("own_cache")

NOBODY = 65534


def make(folder):
    (folder / "content").write_text("made")


def never(folder):
    raise AssertionError("it is made already")


@contextmanager
def child(body):
    """A process that runs `body`, and is gone afterwards."""
    number = os.fork()
    if not number:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    try:
        yield number
    finally:
        try:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def until(true):
    for _ in range(600):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it never came to that")


def test_made_once_and_readable_by_others(own_cache):
    folder = once("kind", "name", make, "it")
    assert folder == own_cache / "kind" / "name" and (folder / "content").read_text() == "made"
    assert once("kind", "name", never, "it") == folder
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in (own_cache / "kind").iterdir()] == ["name"]


def test_what_fails_leaves_nothing(own_cache):
    def fail(folder):
        make(folder)
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        once("kind", "name", fail, "it")
    assert not list((own_cache / "kind").iterdir())
    assert once("kind", "name", make, "it").is_dir()


def hold(place):
    """Make something and never end."""

    def hanging(folder):
        make(folder)
        (place / "begun").touch()
        time.sleep(60)

    return lambda: once("kind", "name", hanging, "it")


def test_two_at_once_and_one_is_killed(own_cache, tmp_path, capfd):
    """The second waits and says for whom; when the first is killed it makes it itself, and takes away what was left."""
    with child(hold(tmp_path)) as first:
        until((tmp_path / "begun").exists)
        with child(lambda: once("kind", "name", make, "data.train")) as second:
            said = ""

            def waits():
                nonlocal said
                said += capfd.readouterr().err
                return "waiting for it" in said

            until(waits)
            assert f"data.train: process {first} on " in said and str(own_cache / "kind" / "name") in said
            assert not (own_cache / "kind" / "name").exists()
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
            assert os.waitpid(second, 0)[1] == 0
    assert [path.name for path in (own_cache / "kind").iterdir()] == ["name"]
    assert (own_cache / "kind" / "name" / "content").read_text() == "made"


def test_the_second_takes_what_the_first_made(own_cache, tmp_path):
    def slow(folder):
        (tmp_path / "begun").touch()
        until((tmp_path / "go").exists)
        make(folder)

    with child(lambda: once("kind", "name", slow, "it")):
        until((tmp_path / "begun").exists)
        with child(lambda: once("kind", "name", never, "it")) as second:
            time.sleep(0.3)
            (tmp_path / "go").touch()
            assert os.waitpid(second, 0)[1] == 0


def test_leftovers(own_cache, tmp_path):
    """Of the killed are taken away whatever was made, those of the living stay; where no lock tells, time does."""
    with child(hold(tmp_path)) as number:
        until((tmp_path / "begun").exists)
        (living,) = (own_cache / "kind").glob(".making-name-*")
        dead = own_cache / "kind" / ".making-another-abcdefgh"
        early, old = own_cache / "kind" / ".preparing-new", own_cache / "kind" / ".converting-old"
        for folder in (dead, early, old):
            folder.mkdir()
            make(folder)
        os.utime(old, (1, 1))
        once("kind", "third", make, "it")
        assert living.exists() and early.exists() and not dead.exists() and not old.exists()
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
    once("kind", "fourth", make, "it")
    assert not living.exists()


@pytest.fixture
def shared(monkeypatch):
    """A cache where other users may look; pytest's own folders are one user's."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("DISTILL_CACHE", f"{folder}/cache")
        yield Path(folder)


@pytest.mark.parametrize(
    ("closed", "part"),
    [("cache", "read: Permission denied"), ("cache/kind", "read: Permission denied"), (None, "written: Permission denied")],
)
def test_another_users_folder(shared, closed, part):
    once("kind", "name", make, "it")
    if closed:
        (shared / closed).chmod(0o700)

    def as_nobody():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        if not closed:  # what is there can be read by anybody
            assert (once("kind", "name", never, "it") / "content").read_text() == "made"
        with pytest.raises(CacheError) as caught:
            once("kind", "other", make, "it")
        said = str(caught.value)
        assert (
            f"cannot be {part}" in said and "belongs to root" in said and "set DISTILL_CACHE to a folder of your own" in said
        )

    with child(as_nobody) as number:
        assert os.waitpid(number, 0)[1] == 0


def test_a_made_folder_that_only_its_maker_may_read(shared):
    """As earlier versions made them."""
    once("kind", "name", make, "it").chmod(0o700)

    def as_nobody():
        os.setuid(NOBODY)
        with pytest.raises(CacheError, match=r"name cannot be read: its rights are 700 .*belongs to root"):
            once("kind", "name", make, "it")

    with child(as_nobody) as number:
        assert os.waitpid(number, 0)[1] == 0


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_at(tmp_path / "disk", "100k") as folder:
        yield folder


def test_disks_that_take_nothing(small_disk, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(small_disk / "cache"))

    def large(folder):
        with cache.writing(folder.parent):
            (folder / "content").write_bytes(b"x" * 200_000)

    with pytest.raises(CacheError, match=f"cannot be written: {os.strerror(errno.ENOSPC)}; make room .*DISTILL_CACHE"):
        once("kind", "name", large, "it")
    assert not list((small_disk / "cache" / "kind").iterdir())
    made = once("kind", "name", make, "it")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert once("kind", "name", never, "it") == made  # what is there is used
    with pytest.raises(CacheError, match=os.strerror(errno.EROFS)):
        once("kind", "other", make, "it")


def test_where_there_are_no_locks(own_cache, monkeypatch):
    """Both make it, and one is taken."""
    monkeypatch.setattr(cache.FileLock, "acquire", lambda *given, **options: (_ for _ in ()).throw(NotImplementedError()))
    inner = []

    def twice(folder):
        inner.append(once("kind", "name", make, "it"))
        make(folder)

    assert once("kind", "name", twice, "it") == inner[0] and (inner[0] / "content").read_text() == "made"
    assert [path.name for path in (own_cache / "kind").iterdir()] == ["name"]


def test_where_the_cache_is(monkeypatch, own_cache, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, place in (
        ("", tmp_path / "home/.cache/distill"),
        (" ", tmp_path / "home/.cache/distill"),
        ("~/x", tmp_path / "home/x"),
    ):
        monkeypatch.setenv("DISTILL_CACHE", given)
        assert cache_folder() == place
    monkeypatch.setenv("DISTILL_CACHE", "~nobody-of-that-name/x")
    with pytest.raises(CacheError, match=r"no home folder to keep the cache in .*set DISTILL_CACHE to a folder"):
        cache_folder()
    for place in ("file", "file/further"):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / place))
        with pytest.raises(CacheError, match=r"cannot be written: (Not a directory|File exists)"):
            once("kind", "name", make, "it")
    monkeypatch.setenv("DISTILL_CACHE", str(own_cache))
    (own_cache / "kind").mkdir(parents=True)
    (own_cache / "kind" / "name").write_text("in the way")
    with pytest.raises(CacheError, match="name should be a folder of the cache, but is none; delete it"):
        once("kind", "name", make, "it")
