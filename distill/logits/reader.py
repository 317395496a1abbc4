"""Reads a cache of logits: the windows that it holds, and their distributions."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.disk import file_hash
from distill.errors import UserError, reason_of
from distill.logits.facts import Facts, Shard, mend, read_facts, read_shards

OPEN = 32  # shards that are held open


class Known(NamedTuple):
    """The cached part of some windows' distributions; see `distill.logits`."""

    ids: Int[Tensor, "b t k"]
    logs: Float[Tensor, "b t k"]
    rest: Float[Tensor, "b t"]

    def to(self, device: torch.device) -> "Known":
        """On a device."""
        return Known(*(tensor.to(device, non_blocking=True) for tensor in self))


class LogitCache:
    """A folder of logits. Sizes are checked when it is opened, each shard's hash and contents when it is first read.

    facts: its cache.json. count: the number of windows.
    """

    def __init__(self, folder: Path, where: str, only: str | None = None) -> None:
        """where: the key or option that names the folder, for messages. only: the one shard to open.

        Raises:
            UserError: there is no cache, or one of its files is missing, cut off or of another cache.
        """
        self.folder, self.where = folder, where
        self.facts: Facts = read_facts(folder, where)
        self._shards: dict[str, Shard] = read_shards(folder, only)
        self._names = list(self._shards)
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._checked: set[str] = set()
        for name, shard in self._shards.items():
            self._check_there(name, shard)
        shards = [np.array(shard.windows, np.int64) for shard in self._shards.values()]
        sizes = [len(windows) for windows in shards]
        places = np.concatenate([np.zeros(0, np.int64), *shards])
        self._places, first = np.unique(places, return_index=True)
        self._shard_of = np.repeat(np.arange(len(sizes)), np.array(sizes, np.int64))[first]
        self._row_of = np.concatenate([np.zeros(0, np.int64), *map(np.arange, sizes)])[first]
        self.count = len(first)

    def missing(self, places: np.ndarray) -> np.ndarray:
        """The places in the text whose windows are not in the cache, in their order."""
        return places[~np.isin(places, self._places)]

    def known(self, places: Sequence[int]) -> Known:
        """The distributions of some windows.

        Raises:
            UserError: one of them is not in the cache, or a shard is damaged.
        """
        if len(lost := self.missing(np.asarray(places))):
            raise UserError(f"{self.where}: {self.folder} has no window {lost[0]} of the text; run `distill cache` again")
        held = np.searchsorted(self._places, places)
        rows = [self._row(self._names[self._shard_of[index]], int(self._row_of[index])) for index in held]
        ids, logs, rest = (np.stack(parts) for parts in zip(*rows, strict=True))
        return Known(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logs), torch.from_numpy(rest))

    def shards_of(self, places: np.ndarray) -> list[str]:
        """The names of the shards that hold the windows at some places in the text."""
        held = np.unique(self._shard_of[np.isin(self._places, places)])
        return [self._names[index] for index in held]

    def check_whole(self, name: str) -> None:
        """Read a whole shard and check it.

        Raises:
            UserError: it is not what was written, or does not hold distributions.
        """
        if name in self._checked:
            return
        shard, facts = self._shards[name], self.facts
        path = self.folder / f"{name}.safetensors"
        try:
            if file_hash(path) != shard.sha256:
                raise ValueError("it is not what was written there: the disk, or somebody, altered it")
            with safe_open(path, "numpy") as opened:
                arrays = {each: opened.get_tensor(each) for each in ("ids", "logs", "rest")}
            wide = (len(shard.windows), facts.seq_len, facts.top_k)
            forms = {"ids": (facts.ids, wide), "logs": ("float16", wide), "rest": ("float16", wide[:2])}
            for each, (kind, shape) in forms.items():
                if arrays[each].dtype.name != kind or arrays[each].shape != shape:
                    said = f"{arrays[each].dtype.name} {list(arrays[each].shape)}"
                    raise ValueError(f"{each} is {said}, not {kind} {list(shape)}")
            if (
                arrays["ids"].max() >= facts.vocabulary
                or not (arrays["logs"] <= 0.01).all()
                or np.isnan(arrays["rest"]).any()
            ):
                raise ValueError("its numbers are not a distribution")
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(name, error) from error
        self._checked.add(name)

    def _row(self, name: str, row: int) -> tuple[np.ndarray, ...]:
        if name not in self._open:
            self.check_whole(name)
            self._open[name] = safe_open(self.folder / f"{name}.safetensors", "numpy").__enter__()
        self._open.move_to_end(name)
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        try:
            return tuple(self._open[name].get_slice(each)[row] for each in ("ids", "logs", "rest"))
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, error) from error

    def _check_there(self, name: str, shard: Shard) -> None:
        path = self.folder / f"{name}.safetensors"
        if shard.of != self.facts.key:
            raise UserError(f"{self.folder / name}.json is of another cache than {self.folder}; {mend(self.folder, name)}")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read: {reason_of(error)}; {mend(self.folder, name)}") from error
        if size != shard.bytes:
            raise UserError(
                f"{path} is damaged: it has {size:,} bytes, and {shard.bytes:,} were written; {mend(self.folder, name)}"
            )

    def _damaged(self, name: str, error: Exception) -> UserError:
        reason = reason_of(error)
        return UserError(f"{self.folder / name}.safetensors is damaged ({reason}); {mend(self.folder, name)}")
