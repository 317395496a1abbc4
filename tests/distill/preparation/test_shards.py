"""Shards that are gone or damaged are made again; a full disk keeps those that are whole."""

import errno
import os
import shutil

import pytest

from distill.errors import UserError
from distill.text import shards
from distill.text.preparation import prepare
from distill.text.prepared import load
from distill.text.windows import Windows
from tests.distill.preparation.preparing import content
from tests.small_disks import small_disk_at


def test_a_shard_that_is_gone_is_made_again(prepared, sources, monkeypatch):

    for kind in ("local", "mixture", "set"):
        folder = prepared(sources[kind], "cache")
        before, count = content(folder), len(load(folder).shards)
        for gone in ([1], [0, 2], [count - 1]):
            for number in gone:
                shutil.rmtree(folder / f"{number:05d}")
            with pytest.raises(UserError, match=rf"lacks its shard .*{gone[0]:05d}; the same command makes it again"):
                load(folder)
            assert prepared(sources[kind], "cache") == folder and content(folder) == before
    (folder / "00001" / "tokens.npy").unlink()
    with pytest.raises(UserError, match=r"delete .*/00001, and the same command makes it again"):
        _ = load(folder).shards[1].tokens


def test_a_damaged_shard_is_seen_when_it_is_read(prepared, sources):

    folder = prepared(sources["local"], "cache")
    file = folder / "00002" / "tokens.npy"
    altered = bytearray(file.read_bytes())
    altered[-3] ^= 1
    file.write_bytes(altered)
    windows = Windows(folder, 8, 0)
    per_shard = (windows.prepared.shards[0].counts.tokens - 1) // 8
    windows.batch(0, per_shard)
    with pytest.raises(UserError, match=r"00002/tokens.npy is not what was written .*; delete .*/00002, and the same"):
        windows.batch(0, 3 * per_shard)
    shutil.rmtree(folder / "00002")
    prepared(sources["local"], "cache")
    Windows(folder, 8, 0).batch(0, 3 * per_shard)
    shutil.rmtree(folder / "00001")
    shutil.copytree(folder / "00002", folder / "00001")
    with pytest.raises(UserError, match=r"00001 is a shard of another text; delete .*/00001, and the same command makes it"):
        Windows(folder, 8, 0).batch(0, 2 * per_shard)


def test_a_full_disk_keeps_what_is_whole(tokenizer, sources, tmp_path, monkeypatch):
    options = {"separator": None, "seed": 3, "limit": None, "where": "data.train"}
    with small_disk_at(tmp_path / "disk", "1m") as disk:
        monkeypatch.setenv("DISTILL_CACHE", str(disk / "cache"))
        add, filler = shards.Writer.add, disk / "filler"

        def filling(self, *given):
            if self.shards == 2 and not filler.exists():
                with pytest.raises(OSError), filler.open("wb", buffering=0) as file:  # twice what the disk holds
                    for _ in range(2000):
                        file.write(b"x" * 1000)
            add(self, *given)

        full = rf"data\.train could not be prepared: .*{os.strerror(errno.ENOSPC)}.*DISTILL_CACHE"
        with monkeypatch.context() as patch, pytest.raises(UserError, match=full):
            patch.setattr(shards.Writer, "add", filling)
            prepare(sources["local"], tokenizer, **options)
        (left,) = (disk / "cache" / "prepared").iterdir()
        assert {path.name for path in left.iterdir()} == {"00000", "00001", "reading", "stamps.json"}
        filler.unlink()
        parts = content(prepare(sources["local"], tokenizer, **options))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "whole"))
    assert parts == content(prepare(sources["local"], tokenizer, **options))
