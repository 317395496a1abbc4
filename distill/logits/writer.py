"""Writes a cache of logits shard by shard: sound shards stay, missing and damaged ones are made."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from safetensors.numpy import save

from distill.disk import new_file, refuse_link, sweep, writing
from distill.errors import UserError
from distill.logits.facts import FACTS, SHARD, WORDS, Facts, Shard, read_facts, shard_files, write_facts, write_shard_facts
from distill.logits.reader import LogitCache
from distill.reading import size_of

SHARD_BYTES = 64 * 2**20  # of a shard: what memory holds of a cache, and the most that a killed process loses


class LogitWriter:
    """Adds windows to a cache."""

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.folder, self.facts = folder, facts

    def begin(self, places: np.ndarray, out: str) -> tuple[np.ndarray, list[str]]:
        """Make the folder, or go on with it; only one process calls this.

        Args:
            places: the windows that are wanted. out: the option that names the folder, for messages.

        Returns:
            the wanted windows that the cache lacks, and a message for each damaged shard, which is made again.

        Raises:
            UserError: the folder holds something else, cannot be written, or has no room.
        """
        refuse_link(self.folder)
        self._check_mine(out)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        complaints = self._take_away_damaged(out) if (self.folder / FACTS).is_file() else []
        write_facts(self.folder, self.facts)
        left = LogitCache(self.folder, out).missing(places)
        needed, free = len(left) * self.facts.window_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: the logits of {len(left):,} windows take {size_of(needed)}, and {size_of(free)} are free; "
                "make room there, name another folder with --out, or keep fewer tokens with --top-k"
            )
        return left, complaints

    def shards(self, left: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The windows that are left, cut into shards, each with its name."""
        size = max(1, SHARD_BYTES // self.facts.window_bytes)
        taken = [int(cast(re.Match, SHARD.fullmatch(file.name))[1]) for file in shard_files(self.folder)]
        first = max(taken, default=-1) + 1
        for number, start in enumerate(range(0, len(left), size), first):
            yield f"shard-{number:05d}", left[start : start + size]

    def write(self, name: str, windows: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        """Write a shard, whole or not at all.

        Raises:
            UserError: the disk is full, or cannot be written; no earlier shard is lost.
        """
        content = save(arrays, {"of": self.facts.key})
        with new_file(self.folder / f"{name}.safetensors") as opened:
            opened.write(content)
        digest = hashlib.sha256(content).hexdigest()
        shard = Shard(of=self.facts.key, windows=windows.tolist(), bytes=len(content), sha256=digest)
        write_shard_facts(self.folder, name, shard)

    def _check_mine(self, out: str) -> None:
        """Refuse a folder that holds something else."""
        if (self.folder / FACTS).is_file():
            known = read_facts(self.folder, out)
            if name := self.facts.difference(known):
                raise UserError(
                    f"{out} is {self.folder}, which holds a cache of other logits: {WORDS[name]} is {getattr(known, name)} "
                    f"there, and {getattr(self.facts, name)} here; name another folder with --out, or delete that one"
                )
        elif self.folder.exists() and any(not file.name.startswith(".") for file in self.folder.iterdir()):
            raise UserError(
                f"{out} is {self.folder}, which holds something other than a cache of logits; name another folder"
            )

    def _take_away_damaged(self, out: str) -> list[str]:
        """Remove every shard that cannot be used; its windows are made again. Returns a message for each."""
        complaints = []
        for file in shard_files(self.folder):
            try:
                cache = LogitCache(self.folder, out, only=file.stem)
                cache.check_whole(file.stem)
            except UserError as error:
                complaints.append(f"{str(error).partition('; ')[0]}: its windows are made again")
                for part in (file, file.with_suffix(".safetensors")):
                    part.unlink(missing_ok=True)
        return complaints
