"""The schemas of `meta.json`, of a prepared folder and of its shards, and the errors for damaged ones."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from distill.errors import UserError, brief
from distill.schema import Schema, explain

TYPES = {"tokens": ("uint16", "uint32"), "starts": ("int64",), "labels": ("int32",), "hashes": ("uint64",)}
OF_CHATS = {"trained": ("uint8",), "rows": ("int64",)}  # of a shard with chats
LARGEST = 1 << 28  # bytes of meta.json
META = "meta.json"
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Some = Annotated[int, Field(ge=1, lt=2**63)]


class Place(Schema):
    """A place from which a source goes on. turn: its pass over its rows. rows: the rows read in this pass. documents: the
    documents already taken from the next row. taken: the tokens taken in all passes."""

    turn: Whole = 0
    rows: Whole = 0
    documents: Whole = 0
    taken: Whole = 0


class Counts(Schema):
    """Counts and hash of a shard. sha256: of its tokens, and of its marks where it has any. highest: the highest token id.
    longest: the tokens of its longest document. trained: how many tokens are trained on; None where all are."""

    tokens: Some
    documents: Some
    sha256: Hash
    highest: Whole
    longest: Some
    trained: Whole | None = None


class ShardMeta(Counts):
    """`meta.json` of a shard. labels: all label names so far. files: hashes by name. places: where each source goes on."""

    labels: Annotated[list[str], Field(min_length=1)]
    files: dict[str, Hash]
    places: list[Place] = []


class Meta(Schema):
    """`meta.json` of a prepared folder. labels: the label names. sha256: the only shard's; of several shards, a hash of
    theirs. sources: where the text is from."""

    tokens: Some
    documents: Some
    labels: Annotated[list[str], Field(min_length=1)]
    sha256: Hash
    shards: Annotated[list[Counts], Field(min_length=1)]
    sources: list[dict[str, Any]] = []


def shard_name(number: int) -> str:
    """The folder of a shard, inside its text's."""
    return f"{number:05d}"


def missing(folder: Path, meta: Meta) -> list[str]:
    """The shards that a prepared folder lacks."""
    return [shard_name(number) for number in range(len(meta.shards)) if not (folder / shard_name(number)).is_dir()]


def read_meta(folder: Path) -> Meta:
    """Read the `meta.json` of a prepared folder.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read(folder / META, Meta, folder)


def shard_meta(folder: Path, delete: Path) -> ShardMeta:
    """Read the `meta.json` of a shard. delete: what a user deletes if it is damaged.

    Raises:
        UserError: it is missing or damaged.
    """
    meta = _read(folder / META, ShardMeta, delete)
    if set(meta.files) != {f"{name}.npy" for name in (TYPES if meta.trained is None else TYPES | OF_CHATS)}:
        raise damage(folder, f"meta.json names the files {brief(sorted(meta.files))}", delete)
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
        raise damage(file.parent, "; ".join(explain(error, META, schema).splitlines()), delete) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damage(file.parent, error, delete) from error


def damage(folder: Path, reason: object, delete: Path) -> UserError:
    """The error for a damaged folder."""
    return UserError(f"the prepared text in {folder} is damaged ({reason}); {mend(delete)}")


def mend(delete: Path) -> str:
    """The fix for damage, for a message."""
    return f"delete {delete}, and the same command makes it again"
