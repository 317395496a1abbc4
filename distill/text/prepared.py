"""A prepared folder on disk: shards `00000`, `00001` ..., and `meta.json`, which is written last and names them all.

A shard is whole documents, each ended by the separator: `tokens.npy` (one after the other), `starts.npy` (where each begins
in the shard), `labels.npy` (its source, an index of the names in the last `meta.json`), `hashes.npy` (64 bits of a hash of
its tokens) and a `meta.json` of its own. What is read is checked when it is first read, an array at a time: a large text is
not hashed whole at every start.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from distill.disk import file_hash
from distill.errors import UserError, brief
from distill.schema import Schema, explain

TYPES = {"tokens": ("uint16", "uint32"), "starts": ("int64",), "labels": ("int32",), "hashes": ("uint64",)}
LARGEST = 1 << 28  # bytes of meta.json
META = "meta.json"
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Some = Annotated[int, Field(ge=1, lt=2**63)]


class Place(Schema):
    """Where a source goes on: its pass over its rows, the rows behind it, the documents behind it of the row that comes
    next, and the tokens that were taken of it."""

    turn: Whole = 0
    rows: Whole = 0
    documents: Whole = 0
    taken: Whole = 0


class Counts(Schema):
    """What a shard holds: tokens and documents, the hash of its tokens, the highest token, the most tokens of a document."""

    tokens: Some
    documents: Some
    sha256: Hash
    highest: Whole
    longest: Some


class ShardMeta(Counts):
    """`meta.json` of a shard. labels: all names so far. places: where each source goes on behind it. files: their hashes."""

    labels: Annotated[list[str], Field(min_length=1)]
    files: dict[str, Hash]
    places: list[Place] = []


class Meta(Schema):
    """`meta.json` of a prepared folder: counts, names of labels, where the text is from, and its shards. sha256: of the
    tokens; of several shards, of their hashes."""

    tokens: Some
    documents: Some
    labels: Annotated[list[str], Field(min_length=1)]
    sha256: Hash
    shards: Annotated[list[Counts], Field(min_length=1)]
    sources: list[dict[str, Any]] = []


def shard_name(number: int) -> str:
    """The folder of a shard, inside its text's."""
    return f"{number:05d}"


@dataclass(frozen=True)
class Shard:
    """A shard, whose arrays are opened and checked when they are first asked for.

    counts: what the text says of it. first, first_document: tokens and documents of the shards before it. folder: its own.
    delete: what to delete where it is damaged.
    """

    folder: Path
    counts: Counts
    labelled: int
    first: int
    first_document: int
    delete: Path

    @property
    def last(self) -> int:
        """The first token behind it, in the whole text."""
        return self.first + self.counts.tokens

    @cached_property
    def meta(self) -> ShardMeta:
        """What its own `meta.json` says, once it is found to be the shard of this text.

        Raises:
            UserError: it is missing, damaged or of another text.
        """
        meta = shard_meta(self.folder, self.delete)
        if any(getattr(meta, name) != getattr(self.counts, name) for name in Counts.model_fields):
            raise UserError(f"{self.folder} is a shard of another text; {_mend(self.delete)}")
        return meta

    @cached_property
    def tokens(self) -> np.ndarray:
        """All its tokens, mapped."""
        found = self._array("tokens", self.counts.tokens)
        if (highest := int(found.max())) > self.counts.highest:
            raise self._damaged(f"tokens.npy has a token {highest}, and the highest written was {self.counts.highest}")
        return found

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins, in the shard."""
        found = np.array(self._array("starts", self.counts.documents))
        if found[0] != 0 or found[-1] >= self.counts.tokens or (np.diff(found) < 1).any():
            raise self._damaged("starts.npy does not say where documents begin")
        return found

    @cached_property
    def labels(self) -> np.ndarray:
        """The number of each document's label."""
        found = np.array(self._array("labels", self.counts.documents))
        if found.min() < 0 or found.max() >= self.labelled:
            raise self._damaged(f"labels.npy goes beyond the {self.labelled} names of labels")
        return found

    @property
    def hashes(self) -> np.ndarray:
        """64 bits of a hash of each document's tokens."""
        return self._array("hashes", self.counts.documents)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, the one that ends it included."""
        return np.diff(np.append(self.starts, self.counts.tokens))

    def check(self) -> None:
        """Look at all of it now.

        Raises:
            UserError: an array is missing, cut, altered or of another form.
        """
        _ = self.tokens, self.starts, self.labels, self.hashes

    def _array(self, name: str, count: int) -> np.ndarray:
        """An array, mapped, once it is found to be what was written.

        Raises:
            UserError: it is missing, cut, altered or of another form.
        """
        file, known = self.folder / f"{name}.npy", self.meta.files.get(f"{name}.npy")
        try:
            if file_hash(file) != known:
                raise UserError(
                    f"{file} is not what was written there: the disk, or somebody, altered it; {_mend(self.delete)}"
                )
            found = np.lib.format.open_memmap(file, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        if found.dtype.name not in TYPES[name] or found.shape != (count,):
            wanted = f"{' or '.join(TYPES[name])} [{count}]"
            raise self._damaged(f"{name}.npy holds {found.dtype.name} {list(found.shape)}, not {wanted}")
        return found

    def _damaged(self, reason: object) -> UserError:
        return _damage(self.folder, reason, self.delete)


@dataclass(frozen=True)
class Prepared:
    """A prepared folder: what its meta.json says, and its shards."""

    folder: Path
    meta: Meta
    shards: list[Shard]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.meta.tokens

    @property
    def highest(self) -> int:
        """The highest token id."""
        return max(shard.counts.highest for shard in self.shards)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(shard.counts.longest for shard in self.shards)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins, in the whole text: of texts that are held in memory."""
        return np.concatenate([shard.starts + shard.first for shard in self.shards])

    @cached_property
    def labels(self) -> np.ndarray:
        """The number of each document's label, in the whole text."""
        return np.concatenate([shard.labels for shard in self.shards])

    @cached_property
    def hashes(self) -> np.ndarray:
        """64 bits of a hash of each document's tokens, in the whole text."""
        return np.concatenate([shard.hashes for shard in self.shards])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, in the whole text."""
        return np.diff(np.append(self.starts, self.tokens))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1 of the whole text; fewer where it ends."""
        inside = [shard for shard in self.shards if shard.first < stop and shard.last > start]
        parts = [shard.tokens[max(start - shard.first, 0) : stop - shard.first] for shard in inside]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


def load(folder: Path) -> Prepared:
    """Open a prepared folder, once its shards are found to be there; the first is looked at now, the others when they are
    first read.

    Raises:
        UserError: a shard is missing; one is cut, altered or of another form.
    """
    meta = read_meta(folder)
    shards, first, documents = [], 0, 0
    for number, counts in enumerate(meta.shards):
        place = folder / shard_name(number)
        delete = folder if len(meta.shards) == 1 else place
        shards.append(Shard(place, counts, len(meta.labels), first, documents, delete))
        first, documents = first + counts.tokens, documents + counts.documents
    if (first, documents) != (meta.tokens, meta.documents):
        raise _damage(folder, f"its shards hold {first} tokens of {documents} documents", folder)
    if lost := missing(folder, meta):
        raise UserError(f"the prepared text lacks its shard {folder / lost[0]}; the same command makes it again")
    shards[0].check()
    return Prepared(folder, meta, shards)


def missing(folder: Path, meta: Meta) -> list[str]:
    """The shards of a prepared folder that are not there."""
    return [shard_name(number) for number in range(len(meta.shards)) if not (folder / shard_name(number)).is_dir()]


def read_meta(folder: Path) -> Meta:
    """What the `meta.json` of a prepared folder says.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read(folder / META, Meta, folder)


def shard_meta(folder: Path, delete: Path) -> ShardMeta:
    """What the `meta.json` of a shard says. delete: what to delete where it is damaged.

    Raises:
        UserError: it is missing or damaged.
    """
    meta = _read(folder / META, ShardMeta, delete)
    if set(meta.files) != {f"{name}.npy" for name in TYPES}:
        raise _damage(folder, f"meta.json names the files {brief(sorted(meta.files))}", delete)
    return meta


def _read(file: Path, schema: type[Schema], delete: Path):
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"meta.json is larger than {LARGEST:,} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"meta.json is {brief(found)}, not an object")
        return schema(**found)
    except ValidationError as error:
        raise _damage(file.parent, "; ".join(explain(error, META, schema).splitlines()), delete) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damage(file.parent, error, delete) from error


def _damage(folder: Path, reason: object, delete: Path) -> UserError:
    return UserError(f"the prepared text in {folder} is damaged ({reason}); {_mend(delete)}")


def _mend(delete: Path) -> str:
    return f"delete {delete}, and the same command makes it again"
