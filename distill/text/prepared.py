"""A prepared folder on disk: shards `00000`, `00001` ..., and `meta.json`, which is written last and lists them all.

A shard holds whole documents, each ended by the separator: `tokens.npy` (all documents, one after the other), `starts.npy`
(where each document begins in the shard), `labels.npy` (each document's source, an index of the names in the last
`meta.json`), `hashes.npy` (64 bits of a hash of each document's tokens) and a `meta.json` of its own (`shard_facts.py`). If
only what the assistant said is trained on in some chats, a shard also has `trained.npy` (1 at each such token, and at every
token of other text) and `rows.npy` (the row of each document in its file). An array is checked when it is first read, so
that a large text is not hashed whole at every start.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.disk import file_hash
from distill.errors import UserError
from distill.text.shard_facts import (
    OF_CHATS,
    TYPES,
    Counts,
    Meta,
    ShardMeta,
    damage,
    mend,
    missing,
    read_meta,
    shard_meta,
    shard_name,
)


@dataclass(frozen=True)
class Shard:
    """A shard, whose arrays are opened and checked when they are first read.

    folder: the shard's own. counts: its entry in the text's `meta.json`. labelled: the number of label names. first,
    first_document: how many tokens and documents the shards before it hold. delete: what a user deletes if it is damaged.
    """

    folder: Path
    counts: Counts
    labelled: int
    first: int
    first_document: int
    delete: Path

    @property
    def last(self) -> int:
        """The first token after the shard, in the whole text."""
        return self.first + self.counts.tokens

    @cached_property
    def meta(self) -> ShardMeta:
        """The shard's own `meta.json`, checked to belong to this text.

        Raises:
            UserError: it is missing, damaged or of another text.
        """
        meta = shard_meta(self.folder, self.delete)
        if any(getattr(meta, name) != getattr(self.counts, name) for name in Counts.model_fields):
            raise UserError(f"{self.folder} is a shard of another text; {mend(self.delete)}")
        return meta

    @cached_property
    def tokens(self) -> np.ndarray:
        """All its tokens, memory-mapped."""
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

    @cached_property
    def trained(self) -> np.ndarray | None:
        """1 at each token that is trained on, memory-mapped; None where all tokens are."""
        if self.counts.trained is None:
            return None
        found = self._array("trained", self.counts.tokens)
        if int(np.count_nonzero(found)) != self.counts.trained:
            raise self._damaged(f"trained.npy does not mark {self.counts.trained} tokens")
        return found

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each document in its file, for chats; 0 for other text."""
        if self.counts.trained is None:
            return np.zeros(self.counts.documents, np.int64)
        return np.array(self._array("rows", self.counts.documents))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, the one that ends it included."""
        return np.diff(np.append(self.starts, self.counts.tokens))

    def check(self) -> None:
        """Check all arrays now.

        Raises:
            UserError: an array is missing, cut off, altered or of another type or shape.
        """
        _ = self.tokens, self.starts, self.labels, self.hashes, self.trained, self.rows

    def _array(self, name: str, count: int) -> np.ndarray:
        """An array, memory-mapped, checked to be what was written.

        Raises:
            UserError: it is missing, cut off, altered or of another type or shape.
        """
        file, known = self.folder / f"{name}.npy", self.meta.files.get(f"{name}.npy")
        try:
            if file_hash(file) != known:
                raise UserError(
                    f"{file} is not what was written there: the disk, or somebody, altered it; {mend(self.delete)}"
                )
            found = np.lib.format.open_memmap(file, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        kinds = (TYPES | OF_CHATS)[name]
        if found.dtype.name not in kinds or found.shape != (count,):
            wanted = f"{' or '.join(kinds)} [{count}]"
            raise self._damaged(f"{name}.npy holds {found.dtype.name} {list(found.shape)}, not {wanted}")
        return found

    def _damaged(self, reason: object) -> UserError:
        return damage(self.folder, reason, self.delete)


@dataclass(frozen=True)
class Prepared:
    """A prepared folder: its `meta.json` and its shards."""

    folder: Path
    meta: Meta
    shards: list[Shard]

    @property
    def tokens(self) -> int:
        """The number of tokens."""
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
        """Where each document begins in the whole text; for texts that fit into memory."""
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
    def marked(self) -> bool:
        """Whether some of its tokens are not trained on."""
        return any(shard.counts.trained is not None for shard in self.shards)

    @property
    def trained(self) -> int:
        """How many tokens are trained on."""
        return sum(shard.counts.tokens if shard.counts.trained is None else shard.counts.trained for shard in self.shards)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, in the whole text."""
        return np.diff(np.append(self.starts, self.tokens))

    def marks(self, start: int, stop: int) -> np.ndarray:
        """1 where tokens start .. stop - 1 of the whole text are trained on, else 0."""
        found = np.ones(max(min(stop, self.tokens) - start, 0), np.uint8)
        for shard in self.shards:
            first, last = max(start, shard.first), min(stop, shard.last)
            if first < last and shard.trained is not None:
                found[first - start : last - start] = shard.trained[first - shard.first : last - shard.first]
        return found

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1 of the whole text; fewer where it ends."""
        inside = [shard for shard in self.shards if shard.first < stop and shard.last > start]
        parts = [shard.tokens[max(start - shard.first, 0) : stop - shard.first] for shard in inside]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


def load(folder: Path) -> Prepared:
    """Open a prepared folder. The first shard is checked now, the others when they are first read.

    Raises:
        UserError: a shard is missing, cut off, altered or of another type or shape.
    """
    meta = read_meta(folder)
    shards, first, documents = [], 0, 0
    for number, counts in enumerate(meta.shards):
        place = folder / shard_name(number)
        delete = folder if len(meta.shards) == 1 else place
        shards.append(Shard(place, counts, len(meta.labels), first, documents, delete))
        first, documents = first + counts.tokens, documents + counts.documents
    if (first, documents) != (meta.tokens, meta.documents):
        raise damage(folder, f"its shards hold {first} tokens of {documents} documents", folder)
    if lost := missing(folder, meta):
        raise UserError(f"the prepared text lacks its shard {folder / lost[0]}; the same command makes it again")
    shards[0].check()
    return Prepared(folder, meta, shards)
