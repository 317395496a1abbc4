"""Writes a prepared folder shard by shard, each whole or not at all; a stopped preparation goes on after the last one."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from distill.disk import file_hash
from distill.errors import UserError
from distill.text.shard_facts import META, OF_CHATS, TYPES, Counts, Meta, Place, ShardMeta, shard_meta, shard_name

SIZE = 64_000_000  # tokens of a shard, which then goes on to the end of a document
HELD = 1 << 14  # documents whose beginnings, labels and hashes are held before they are written
BLOCK = 1 << 20  # token ids converted at a time
SCRATCH = ".writing"  # the folder of a shard that is not whole yet


class Writer:
    """Writes a prepared folder document by document; memory holds only the label names and the shards' counts."""

    def __init__(self, folder: Path, dtype: np.dtype | type, size: int = SIZE) -> None:
        """dtype: of the tokens. size: tokens of a shard."""
        self._folder, self._dtype, self._size = folder, np.dtype(dtype), size
        self._names: dict[str, int] = {}
        self._shards: list[Counts] = []
        self._shard: _Shard | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are written."""
        return sum(shard.tokens for shard in self._shards) + (self._shard.tokens if self._shard else 0)

    @property
    def documents(self) -> int:
        """How many documents are written."""
        return sum(shard.documents for shard in self._shards) + (self._shard.documents if self._shard else 0)

    @property
    def shards(self) -> int:
        """How many shards are whole."""
        return len(self._shards)

    @property
    def open(self) -> bool:
        """Whether a shard is being written."""
        return self._shard is not None

    @property
    def full(self) -> bool:
        """Whether the shard being written has its size."""
        return self._shard is not None and self._shard.tokens >= self._size

    def known(self) -> list[Place] | None:
        """Take over the next shard, if an earlier attempt left it whole. Returns where the sources go on after it; None
        where there is no such shard.

        Raises:
            UserError: its `meta.json` is damaged.
        """
        place = self._folder / shard_name(len(self._shards))
        if not place.is_dir():
            return None
        meta = shard_meta(place, place)
        self._names = {name: number for number, name in enumerate(meta.labels)}
        self._shards.append(Counts(**{name: getattr(meta, name) for name in Counts.model_fields}))
        return meta.places

    def add(self, label: str, *parts: Sequence[int] | np.ndarray, trained: np.ndarray | None = None, row: int = 0) -> None:
        """Write a document, with the token that ends it: token ids, in one part or more.

        Args:
            trained: for a chat, whether each token is trained on. row: for a chat, the number of its row in its file.
        """
        if self._shard is None:
            self._shard = _Shard(self._folder / SCRATCH, self._dtype)
        self._shard.add(self._names.setdefault(label, len(self._names)), parts, trained, row)

    def close(self, places: Sequence[Place] = ()) -> None:
        """End the shard being written and give it its name. places: where the sources go on after it."""
        counts, files = cast(_Shard, self._shard).close()
        self._shard = None
        meta = ShardMeta(**counts, labels=list(self._names), files=files, places=list(places))
        scratch = self._folder / SCRATCH
        _write(scratch / META, meta.model_dump(exclude_none=True))
        scratch.rename(self._folder / shard_name(len(self._shards)))
        self._shards.append(Counts(**counts))

    def finish(self, known: Meta | None = None, **facts: Any) -> Meta:
        """End the last shard, write `meta.json` with further facts, and return its content.

        Args:
            known: the earlier `meta.json`, where lost shards were made again.

        Raises:
            UserError: a shard that was made again differs from the lost one.
        """
        if self._shard is not None:
            self.close()
        hashes = [shard.sha256 for shard in self._shards]
        whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        totals: dict[str, Any] = {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": whole,
            "shards": self._shards,
        }
        meta = Meta(labels=list(self._names), **totals, **facts)
        if known is not None and known.sha256 != meta.sha256:
            raise UserError(
                f"the prepared text in {self._folder} differs from what its files give now; delete {self._folder}, and the "
                "same command makes it again"
            )
        _write(self._folder / META, meta.model_dump(exclude_none=True))
        return meta

    def give_up(self) -> None:
        """Remove the shard that is not whole."""
        self._shard = None
        shutil.rmtree(self._folder / SCRATCH, ignore_errors=True)


class _Shard:
    """A shard being written, in a folder of its own."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        folder.mkdir()
        types = {name: np.dtype(kinds[0]) for name, kinds in TYPES.items()} | {"tokens": dtype}
        self._folder = folder
        self._arrays = {name: _Array(folder / f"{name}.npy", kind) for name, kind in types.items()}
        self._held: dict[str, list[int]] = {"starts": [], "labels": [], "hashes": []}
        self._hash, self._highest, self._longest = hashlib.sha256(), 0, 0
        self._trained, self._trained_hash = 0, hashlib.sha256()

    @property
    def tokens(self) -> int:
        return self._arrays["tokens"].count

    @property
    def documents(self) -> int:
        return self._arrays["starts"].count + len(self._held["starts"])

    def add(
        self, label: int, parts: Sequence[Sequence[int] | np.ndarray], trained: np.ndarray | None = None, row: int = 0
    ) -> None:
        if trained is not None and "trained" not in self._arrays:
            self._begin_chats()
        start, own = self.tokens, hashlib.blake2b(digest_size=8)
        for ids in parts:
            for begin in range(0, len(ids), BLOCK):
                block = np.asarray(ids[begin : begin + BLOCK], np.uint32)
                self._highest = max(self._highest, int(block.max()))
                own.update(block.tobytes())
                self._hash.update(self._arrays["tokens"].append(block))
        self._longest = max(self._longest, self.tokens - start)
        for name, value in (("starts", start), ("labels", label), ("hashes", int.from_bytes(own.digest(), "little"))):
            self._held[name].append(value)
        if "trained" in self._arrays:
            self._mark(np.ones(self.tokens - start, bool) if trained is None else trained)
            self._held["rows"].append(row)
        if len(self._held["starts"]) == HELD:
            self._flush()

    def _begin_chats(self) -> None:
        """Begin to write which tokens are trained on, at the first chat; in the documents before it every token is."""
        self._flush()
        for name, kinds in OF_CHATS.items():
            self._arrays[name] = _Array(self._folder / f"{name}.npy", np.dtype(kinds[0]))
        for begin in range(0, self.tokens, BLOCK):
            self._mark(np.ones(min(BLOCK, self.tokens - begin), bool))
        self._held["rows"] = [0] * self.documents
        self._flush()

    def _mark(self, trained: np.ndarray) -> None:
        self._trained += int(np.count_nonzero(trained))
        self._trained_hash.update(self._arrays["trained"].append(trained))

    def _flush(self) -> None:
        for name, values in self._held.items():
            self._arrays[name].append(values)
            values.clear()

    def close(self) -> tuple[dict, dict[str, str]]:
        """Close the files. Returns the shard's counts, and the hashes of its files, which are on disk by now."""
        self._flush()
        for array in self._arrays.values():
            array.close()
        counts = {"tokens": self.tokens, "documents": self.documents, "sha256": self._hash.hexdigest()}
        if "trained" in self._arrays:
            both = f"{counts['sha256']} {self._trained_hash.hexdigest()}"
            counts |= {"sha256": hashlib.sha256(both.encode()).hexdigest(), "trained": self._trained}
        files = {f"{name}.npy": file_hash(self._folder / f"{name}.npy") for name in self._arrays}
        return counts | {"highest": self._highest, "longest": self._longest}, files


class _Array:
    """A one-dimensional .npy file that grows: NumPy's header has room for any length."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file, self._dtype, self.count = path.open("wb"), dtype, 0
        self._header()

    def _header(self) -> None:
        said = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, said)

    def append(self, values) -> bytes:
        content = np.asarray(values, self._dtype).tobytes()
        self._file.write(content)
        self.count += len(content) // self._dtype.itemsize
        return content

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _write(file: Path, content: dict) -> None:
    """Write a small file, whole or not at all."""
    scratch = file.with_name(f".{file.name}~")
    with scratch.open("w", encoding="utf-8") as opened:
        json.dump(content, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    scratch.replace(file)
