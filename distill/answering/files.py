"""The folder of a set of answers: `answers.json`, which describes it, and shards of JSON lines, each whole or absent."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from distill.disk import file_hash, new_file, refuse_link, sweep, write_text, writing
from distill.errors import UserError
from distill.ranges import TEMPERATURE, TOP_P
from distill.reading import read_json
from distill.schema import Schema

FORMAT = 1
FACTS = "answers.json"
SHARD = re.compile(r"answers-(\d{5,9})\.json")
SIZE = 128  # prompts of a shard; a process that is killed loses at most one shard
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
WORDS = {
    "kind": "what is written",
    "model": "the model that answers",
    "prompts": "the prompts",
    "tokens": "--tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "seed": "--seed",
    "unfinished": "--unfinished",
}  # keys of `Facts`, in the order in which a difference is looked for


class Facts(Schema):
    """answers.json. reference: the model's name. model: its fingerprint. prompts: a hash of all prompts."""

    format: int = FORMAT
    kind: Literal["answers", "pairs"]
    reference: str
    model: str
    prompts: Hash
    count: Annotated[int, Field(ge=1, lt=2**40)]
    tokens: Annotated[int, Field(ge=1, lt=2**40)]
    temperature: Annotated[float, TEMPERATURE]
    top_p: Annotated[float, TOP_P]
    seed: Whole
    unfinished: bool

    @property
    def key(self) -> str:
        """A hash of everything that the answers depend on."""
        said = json.dumps(self.model_dump(exclude={"reference"}), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def shards(self) -> int:
        """The number of shards of the whole set."""
        return -(-self.count // SIZE)

    def difference(self, other: "Facts") -> str | None:
        """The first key in which two sets differ."""
        return next((name for name in WORDS if getattr(self, name) != getattr(other, name)), None)


class Shard(Schema):
    """answers-N.json. of: the set's key. sha256: of the .jsonl. counts: of prompts by their outcome, and of tokens."""

    of: Hash
    sha256: Hash
    counts: dict[str, Whole]


class Folder:
    """A set of answers on disk."""

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path, self.facts = path, facts

    def begin(self) -> None:
        """Make the folder, or go on with it; only one process calls this.

        Raises:
            UserError: the folder holds something else, or other answers, or cannot be written.
        """
        refuse_link(self.path)
        self._check_mine()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        sweep(self.path)
        write_text(self.path / FACTS, json.dumps(self.facts.model_dump(), indent=1))

    def missing(self) -> list[int]:
        """The shards that do not exist or are damaged."""
        return [number for number in range(self.facts.shards) if self._found(number) is None]

    def write(self, number: int, rows: Iterable[dict[str, Any]], counts: dict[str, int]) -> None:
        """Write a shard. Its .json comes last: without it, the .jsonl is ignored. A shard without rows has no .jsonl, so
        that `*.jsonl` names only files with text.

        Raises:
            UserError: the disk is full, or cannot be written; no earlier shard is lost.
        """
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="replace")
        file = self.path / f"{_name(number)}.jsonl"
        if content:
            with new_file(file) as opened:
                opened.write(content)
        else:
            with writing(file):
                file.unlink(missing_ok=True)
        shard = Shard(of=self.facts.key, sha256=hashlib.sha256(content).hexdigest(), counts=counts)
        write_text(self.path / f"{_name(number)}.json", json.dumps(shard.model_dump()))

    def counts(self) -> dict[str, int]:
        """The sums over all shards that exist."""
        found: dict[str, int] = {}
        for number in range(self.facts.shards):
            shard = self._found(number)
            for name, count in (shard.counts if shard else {}).items():
                found[name] = found.get(name, 0) + count
        return found

    def _found(self, number: int) -> Shard | None:
        """The .json of a shard that is whole; None where the shard is missing or damaged."""
        file = self.path / f"{_name(number)}.json"
        rows = file.with_suffix(".jsonl")
        if not file.is_file() or rows.is_symlink():
            return None
        try:
            shard = Shard(**read_json(file, TypeAdapter(Shard), fix="it is made again"))
        except UserError:
            return None
        found = file_hash(rows) if rows.is_file() else hashlib.sha256(b"").hexdigest()
        whole = shard.of == self.facts.key and found == shard.sha256
        return shard if whole else None

    def _check_mine(self) -> None:
        """Refuse a folder that holds something else."""
        file = self.path / FACTS
        if file.is_file():
            again = f"name another folder with --out, or delete {self.path}"
            known = Facts(**read_json(file, TypeAdapter(Facts), fix=again))
            if name := "format" if known.format != FORMAT else self.facts.difference(known):
                raise UserError(
                    f"--out is {self.path}, which holds other answers: {WORDS.get(name, 'the format')} is "
                    f"{getattr(known, name)} there, and {getattr(self.facts, name)} here; {again}"
                )
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out is {self.path}, which is a file; name a folder")
        elif self.path.exists() and any(not one.name.startswith(".") for one in self.path.iterdir()):
            raise UserError(f"--out is {self.path}, which holds something other than answers; name another folder")


def _name(number: int) -> str:
    return f"answers-{number:05d}"
