"""The answer of an engine's script, read from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy


@dataclass(frozen=True)
class Answer:
    """What an engine computed for a job.

    name: for messages. rows: logits of the job's positions, one text after the other, [positions, vocabulary]; or
    log-probabilities, which differ from logits by one number a row. logprobs: of every token of a text but the first.
    tokens, own: the tokens taken at each step, and those that the engine found most likely, [prompts, steps]. second,
    margins: the second most likely token of each step, and by how much its logit is lower. checks: for each other way of
    computing the same thing, the largest [difference, text, position, value, wanted value]; None if it could not be tried.
    ids: the tokens of the job's strings by the engine's own tokenizer.
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
        """Read an answer from the folder that a script wrote.

        Raises:
            OSError, ValueError: the folder holds no answer, or a damaged one.
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
        """The perplexity of the texts."""
        return float(numpy.exp(-numpy.concatenate(self.logprobs).mean()))

    def log_rows(self) -> numpy.ndarray:
        """Return `rows` as log-probabilities, in float64."""
        rows = self.rows.astype(numpy.float64)
        rows = rows - rows.max(-1, keepdims=True)
        return rows - numpy.log(numpy.exp(rows).sum(-1, keepdims=True))
