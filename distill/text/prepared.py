"""A prepared folder on disk: `tokens.npy` (all documents one after the other, each ended by the separator), `starts.npy`
(where each document begins), `labels.npy` (its source, an index of the names in `meta.json`) and `meta.json`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from distill.errors import UserError, brief
from distill.schema import Schema, explain

ARRAYS = ("tokens", "starts", "labels")
HELD = 1 << 14  # documents whose beginnings and labels are held before they are written
BLOCK = 1 << 20  # token ids converted at a time
LARGEST = 1 << 28  # bytes of meta.json
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Meta(Schema):
    """What `meta.json` says: counts, names of labels, where the text is from, and the hashes of the tokens (`sha256`) and of
    the files."""

    tokens: Annotated[int, Field(ge=1, lt=2**63)]
    documents: Annotated[int, Field(ge=1, lt=2**63)]
    labels: Annotated[list[str], Field(min_length=1)]
    sha256: Hash
    files: dict[str, Hash]
    sources: list[dict[str, Any]] = []


class Writer:
    """Writes a prepared folder document by document; nothing but names of labels stays in memory."""

    def __init__(self, folder: Path, dtype: np.dtype | type) -> None:
        """dtype: of the tokens."""
        self._folder, self._names = folder, {}
        types = {"tokens": dtype, "starts": np.int64, "labels": np.int32}
        self._arrays = {name: _Array(folder / f"{name}.npy", np.dtype(types[name])) for name in ARRAYS}
        self._hash, self._starts, self._labels = hashlib.sha256(), [], []

    @property
    def tokens(self) -> int:
        """How many are written."""
        return self._arrays["tokens"].count

    @property
    def documents(self) -> int:
        """How many are written."""
        return self._arrays["starts"].count + len(self._starts)

    def add(self, label: str, *parts: Sequence[int] | np.ndarray) -> None:
        """Write a document, its end included: token ids, in one part or more."""
        self._starts.append(self.tokens)
        self._labels.append(self._names.setdefault(label, len(self._names)))
        if len(self._starts) == HELD:
            self._flush()
        for ids in parts:
            for start in range(0, len(ids), BLOCK):
                self._hash.update(self._arrays["tokens"].append(ids[start : start + BLOCK]))

    def _flush(self) -> None:
        self._arrays["starts"].append(self._starts)
        self._arrays["labels"].append(self._labels)
        self._starts, self._labels = [], []

    def finish(self, **facts) -> dict:
        """Write `meta.json` with further facts, and give what it says."""
        self._flush()
        for array in self._arrays.values():
            array.close()
        meta = {
            "tokens": self.tokens,
            "documents": self.documents,
            "labels": list(self._names),
            "sha256": self._hash.hexdigest(),
            "files": {f"{name}.npy": file_hash(self._folder / f"{name}.npy") for name in ARRAYS},
            **facts,
        }
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=1))
        return meta


class _Array:
    """A .npy file of one dimension that grows: NumPy leaves room in its header for any length."""

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
        self._file.close()


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, open: what its meta.json says, and its arrays, the tokens mapped."""

    meta: dict
    tokens: np.ndarray
    starts: np.ndarray
    labels: np.ndarray

    @property
    def highest(self) -> int:
        """The highest token id."""
        return int(self.tokens.max())


def load(folder: Path) -> Prepared:
    """Open a prepared folder, once its files are found to be what was written and to hold what a prepared folder holds.

    Raises:
        UserError: one is missing, cut, altered or of another form.
    """
    meta = read_meta(folder)
    try:
        arrays = Prepared(meta, *(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in ARRAYS))
        _check(arrays)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the prepared text in {folder} is damaged ({error}); {_mend(folder)}") from error
    return Prepared(meta, arrays.tokens, np.array(arrays.starts), np.array(arrays.labels))


def _check(found: Prepared) -> None:
    meta, types = found.meta, {"tokens": ("uint16", "uint32"), "starts": ("int64",), "labels": ("int32",)}
    counts = {"tokens": meta["tokens"], "starts": meta["documents"], "labels": meta["documents"]}
    for name in ARRAYS:
        array = getattr(found, name)
        if array.dtype.name not in types[name] or array.shape != (counts[name],):
            raise ValueError(
                f"{name}.npy holds {array.dtype.name} {list(array.shape)}, not {' or '.join(types[name])} [{counts[name]}]"
            )
    if found.starts[0] != 0 or found.starts[-1] >= meta["tokens"] or (np.diff(found.starts) < 1).any():
        raise ValueError("starts.npy does not say where documents begin")
    if found.labels.min() < 0 or found.labels.max() >= len(meta["labels"]):
        raise ValueError(f"labels.npy goes beyond the {len(meta['labels'])} names of labels")


def read_meta(folder: Path) -> dict:
    """What `meta.json` says, once the files are found to be what was written.

    Raises:
        UserError: one is missing, cut or altered.
    """
    try:
        file = folder / "meta.json"
        if file.stat().st_size > LARGEST:
            raise ValueError(f"meta.json is larger than {LARGEST:,} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"meta.json is {brief(found)}, not an object")
        meta = Meta(**found).model_dump()
        if set(meta["files"]) != {f"{name}.npy" for name in ARRAYS}:
            raise ValueError(f"meta.json names the files {brief(sorted(meta['files']))}")
        files = {name: file_hash(folder / name) for name in meta["files"]}
    except ValidationError as error:
        said = "; ".join(explain(error, "meta.json", Meta).splitlines())
        raise UserError(f"the prepared text in {folder} is damaged ({said}); {_mend(folder)}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the prepared text in {folder} is damaged ({error}); {_mend(folder)}") from error
    if altered := [name for name, known in meta["files"].items() if files[name] != known]:
        raise UserError(
            f"{folder / altered[0]} is not what was written there: the disk, or somebody, altered it; {_mend(folder)}"
        )
    return meta


def file_hash(name: str | Path) -> str:
    """The SHA-256 of a file."""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mend(folder: Path) -> str:
    return f"delete {folder}, and the same command makes it again"
