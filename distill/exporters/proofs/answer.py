"""What an engine's script answered, as it lies in its folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy


@dataclass(frozen=True)
class Answer:
    """name: for messages. rows: logits (or log-probabilities, which differ by a number a row) of the positions asked for,
    one text after the other, [positions, vocabulary]. logprobs: of every token of a text but the first.
    tokens: those taken, own: those that it would have taken, both [prompts, steps]; second, margins: the second most likely
    token of each step, and how far its logit is behind. checks: ways of computing the same thing, each with its furthest
    [difference, text, position, value, wanted value], None where there was nothing to try. ids: how an engine with a
    tokenizer of its own cuts the strings asked for.
    """

    name: str
    version: str
    rows: numpy.ndarray
    logprobs: list[numpy.ndarray]
    tokens: list[list[int]]
    own: list[list[int]]
    second: list[list[int]]
    margins: list[list[float]]
    checks: dict[str, list | None]
    ids: list[list[int]]

    @classmethod
    def read(cls, folder: Path, name: str) -> "Answer":
        """From the folder that a script wrote.

        Raises:
            OSError, ValueError: it wrote nothing, or something else.
        """
        entries = json.loads((folder / "answer.json").read_text())
        version = entries["version"]
        lists = {key: entries.get(key, []) for key in ("tokens", "own", "second", "margins", "ids")}
        return cls(
            name=f"{name} {version}".strip(),
            version=version,
            rows=numpy.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False),
            logprobs=[numpy.asarray(each, dtype=numpy.float64) for each in entries["logprobs"]],
            checks=entries.get("checks", {}),
            **lists,
        )

    @property
    def perplexity(self) -> float:
        """Of the texts."""
        return float(numpy.exp(-numpy.concatenate(self.logprobs).mean()))

    def log_rows(self) -> numpy.ndarray:
        """`rows` as log-probabilities, in float64."""
        rows = self.rows.astype(numpy.float64)
        rows = rows - rows.max(-1, keepdims=True)
        return rows - numpy.log(numpy.exp(rows).sum(-1, keepdims=True))
