"""The schemas of a cache of logits (`cache.json`) and of its shards, and the comparison of two caches."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from distill.disk import write_text
from distill.errors import UserError
from distill.reading import read_json
from distill.schema import Schema
from teachers.fingerprint import difference

FORMAT = 1
FACTS = "cache.json"
SHARD = re.compile(r"shard-(\d{5,9})\.json")
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**40)]
# The keys of `Facts`, in the order in which a difference is looked for: an earlier one changes the later ones too.
WORDS = {
    "seed": "the seed",
    "tokenizer": "the tokenizer",
    "seq_len": "the windows' length",
    "long_documents": "data.long_documents",
    "text": "the training text",
    "teacher": "the teacher",
    "vocabulary": "the vocabulary's size",
    "temperature": "the temperature",
    "top_k": "the number of likeliest tokens",
}


class Facts(Schema):
    """cache.json. reference: the teacher's name. teacher: its fingerprint. tokenizer: the tokenizer's part of the
    fingerprint of the run's teacher. text: the hash of the training text's tokens. vocabulary: entries of the softmax."""

    format: int = FORMAT
    reference: str
    teacher: str
    tokenizer: str
    text: Hash
    seq_len: Positive
    seed: Whole
    long_documents: str
    temperature: Annotated[float, Field(gt=0)]
    top_k: Positive
    vocabulary: Positive

    @property
    def key(self) -> str:
        """A hash of everything that the numbers depend on."""
        said = json.dumps(self.model_dump(exclude={"reference"}), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def ids(self) -> str:
        """The type of the token ids."""
        return "uint16" if self.vocabulary <= 2**16 else "uint32"

    @property
    def window_bytes(self) -> int:
        """The bytes of a window."""
        return self.seq_len * (self.top_k * (2 + int(self.ids[4:]) // 8) + 2)

    def difference(self, other: "Facts", among: tuple[str, ...] = tuple(WORDS)) -> str | None:
        """The first key in which two caches differ; a teacher counts as the same in every dtype that it is held in."""
        return next((name for name in WORDS if name in among and self._differs(other, name)), None)

    def _differs(self, other: "Facts", name: str) -> bool:
        mine, theirs = getattr(self, name), getattr(other, name)
        return mine != theirs and (name != "teacher" or difference(mine, theirs) is not None)


class Shard(Schema):
    """shard-N.json. of: the cache's key. windows: their places in the text. bytes, sha256: of the .safetensors."""

    of: Hash
    windows: Annotated[list[Whole], Field(min_length=1)]
    bytes: Whole
    sha256: Hash


def read_facts(folder: Path, where: str) -> Facts:
    """Read cache.json. where: the key or option that names the folder, for messages.

    Raises:
        UserError: there is no cache, or its cache.json is damaged or of another format.
    """
    file = folder / FACTS
    if not file.is_file():
        raise UserError(
            f"{where} is {folder}, which is not a cache of logits: it has no {FACTS}; make one with `distill cache` of the "
            f"same recipe and --out {folder}"
        )
    found = Facts(**read_json(file, TypeAdapter(Facts), fix=f"delete {folder} and make it again with `distill cache`"))
    if found.format != FORMAT:
        raise UserError(
            f"{file} is of format {found.format}, and this version reads format {FORMAT}; make it again with `distill cache`"
        )
    if found.top_k >= found.vocabulary:
        raise UserError(
            f"{file} is damaged (top_k is {found.top_k} of a vocabulary of {found.vocabulary}); delete {folder} and make it "
            "again with `distill cache`"
        )
    return found


def write_facts(folder: Path, facts: Facts) -> None:
    """Write cache.json."""
    write_text(folder / FACTS, json.dumps(facts.model_dump(), indent=1))


def read_shards(folder: Path, only: str | None = None) -> dict[str, Shard]:
    """Read the .json of each shard, in order, by its name without an ending; or of one shard (`only`).

    Raises:
        UserError: one of the files is damaged.
    """
    files = shard_files(folder) if only is None else [folder / f"{only}.json"]
    return {file.stem: Shard(**read_json(file, TypeAdapter(Shard), fix=mend(folder, file.stem))) for file in files}


def shard_files(folder: Path) -> list[Path]:
    """The .json of every shard, in order."""
    return sorted(file for file in folder.iterdir() if SHARD.fullmatch(file.name))


def write_shard_facts(folder: Path, name: str, shard: Shard) -> None:
    """Write a shard's .json, after its .safetensors, which is ignored without it."""
    write_text(folder / f"{name}.json", json.dumps(shard.model_dump()))


def mend(folder: Path, name: str) -> str:
    """The fix for a shard that cannot be used, for a message."""
    return f"delete {folder / name}.*, and `distill cache` of the same recipe into this folder makes its windows again"
