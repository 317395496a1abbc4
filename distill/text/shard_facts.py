"""What the `meta.json` of a prepared folder and of its shards say."""

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
    """Where a source goes on: its pass over its rows, the rows behind it, the documents behind it of the row that comes
    next, and the tokens that were taken of it."""

    turn: Whole = 0
    rows: Whole = 0
    documents: Whole = 0
    taken: Whole = 0


class Counts(Schema):
    """What a shard holds: tokens and documents, the hash of its tokens, the highest token, the most tokens of a document.
    trained: tokens that are trained on; None where that is all. The hash is then of these too."""

    tokens: Some
    documents: Some
    sha256: Hash
    highest: Whole
    longest: Some
    trained: Whole | None = None


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
    """What to say of a folder that is not what was written."""
    return UserError(f"the prepared text in {folder} is damaged ({reason}); {mend(delete)}")


def mend(delete: Path) -> str:
    """What to do about it."""
    return f"delete {delete}, and the same command makes it again"
