"""Proof in transformers, as a plain script: `python transformers.py JOB.json` in an environment that has transformers.

`AutoModelForCausalLM` loads the job's folder in float32, while imports of this project are blocked. The script writes the
answer that `answer.py` reads: the logits of the texts, and the tokens after all prompts, by `generate` in one batch that is
padded on the left. With `checks` it also compares other ways of computing the same thing with each whole text alone: texts
in a padded batch, a prompt in chunks, tokens decoded from a cache.
"""

import importlib.abc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

OURS = ("distill", "students", "teachers")
STEPS = 10  # the whole distribution is compared at every STEPS-th decoded token
CHUNKS = (7, 100)  # sizes of a prompt's chunks in tokens


class Absent(importlib.abc.MetaPathFinder):
    """An import hook that blocks this project where it is installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}: an export runs without this project", name=name)
        return None


class Along:
    """A logits processor that makes a model take its most likely token, and records every step."""

    def __init__(self) -> None:
        self.best: list[Any] = []
        self.rows: list[torch.Tensor] = []
        self.said: list[torch.Tensor] = []  # log-probabilities of the tokens taken

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        best = logits.topk(2, dim=-1)
        if len(self.best) % STEPS == 0:
            self.rows.append(logits.clone())
        self.best.append(best)
        self.said.append(best.values[:, 0] - logits.logsumexp(-1))
        return torch.full_like(scores, float("-inf")).scatter(1, best.indices[:, :1], 0.0)

    def entries(self) -> dict[str, Any]:
        """Return the tokens' entries of answer.json."""
        indices, values = zip(*((best.indices, best.values) for best in self.best), strict=True)
        return steps_of(torch.stack(indices, 1), torch.stack(values, 1))


def in_type(model: Any, dtype: str) -> Any:
    """Set a model to a job's type, for evaluation.

    For float64, `torch.float32` is replaced by float64 in this process, because models' classes cast to float32 in places.
    """
    if dtype == "float64":
        model = model.double()
        replaced: Any = torch
        replaced.float32 = replaced.float = torch.float64
        replaced.Tensor.float = torch.Tensor.double
    return model.eval()


def steps_of(indices: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    """Return entries of answer.json from the two most likely tokens of every step and their logits. [prompts, steps, 2]"""
    entries = {"own": indices[..., 0], "second": indices[..., 1], "margins": values[..., 0] - values[..., 1]}
    return {name: found.tolist() for name, found in entries.items()} | {"tokens": indices[..., 0].tolist()}


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts as one batch, padded on the left, and its mask."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])


def alone(model: Any, text: list[int]) -> torch.Tensor:
    """Return the logits of every position of one text. [tokens, vocabulary]"""
    return model(torch.tensor([text]), use_cache=False).logits[0].float()


def said_of(logits: torch.Tensor, text: list[int]) -> torch.Tensor:
    """Return the log-probability of every token of a text but the first."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def furthest(found: torch.Tensor, wanted: torch.Tensor, where: Callable[[int], tuple]) -> list[Any]:
    """Return the largest difference and its place: [difference, text, position, found, wanted]."""
    away = (found - wanted).abs()
    away[away.isnan()] = float("inf")
    place = numpy.unravel_index(int(away.argmax()), tuple(away.shape))
    return [float(away[place]), *where(int(place[0])), float(found[place]), float(wanted[place])]


def at(number: int, positions: Sequence[int]) -> Callable[[int], tuple]:
    """Return a function from a row of a text to its text and position, for `furthest`."""
    return lambda row: (number, positions[row])


def without_settings(model: Any) -> None:
    """Reset a model's generation settings: penalties and stops are not part of what it computes."""
    model.generation_config = type(model.generation_config)()


def going_on(model: Any, prompts: list[list[int]], steps: int) -> Along:
    """Generate tokens after all prompts, in one batch."""
    without_settings(model)
    ids, mask = padded(prompts)
    along = Along()
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[along],
    )
    return along


def along_tokens(model: Any, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, Any]:
    """Return the most likely tokens of every step of given tokens, from whole texts."""
    best = [
        alone(model, prompt + taken)[len(prompt) - 1 : -1].topk(2) for prompt, taken in zip(prompts, tokens, strict=True)
    ]
    steps = steps_of(torch.stack([each.indices for each in best]), torch.stack([each.values for each in best]))
    return steps | {"tokens": tokens}


def in_a_batch(model: Any, texts: list[list[int]], rows: list[list[int]], whole: list[torch.Tensor]) -> list[Any] | None:
    """Return the largest difference between texts in a padded batch and each text alone."""
    ids, mask = padded(texts)
    width = ids.shape[1]
    worst: list[Any] | None = None
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for number, text in enumerate(texts):
        found = logits[number, [width - len(text) + row for row in rows[number]]].float()
        away = furthest(found, whole[number], at(number, rows[number]))
        worst = max(worst or away, away, key=lambda each: each[0])
    return worst


def in_chunks(model: Any, text: list[int], last: torch.Tensor) -> list[Any] | None:
    """Return the largest difference between the last logits of a text in chunks and of the whole text."""
    without_settings(model)
    worst: list[Any] | None = None
    for columns in (columns for columns in CHUNKS if columns < len(text)):
        out = model.generate(
            torch.tensor([text]),
            max_new_tokens=1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            prefill_chunk_size=columns,
            return_dict_in_generate=True,
            output_logits=True,
        )
        away = furthest(out.logits[0].float(), last[None], lambda _: (None, len(text) - 1))
        worst = max(worst or away, away, key=lambda each: each[0])
    return worst


def decoded(model: Any, prompts: list[list[int]], along: Along, tokens: list[list[int]]) -> list[Any] | None:
    """Return the largest difference between decoding from a cache and whole texts.

    Distributions are compared at some steps, log-probabilities at all.
    """
    worst: list[Any] | None = None
    for number, prompt in enumerate(prompts):
        logits = alone(model, prompt + tokens[number])
        first = len(prompt) - 1
        wanted = logits[first : first + len(tokens[number]) : STEPS]
        found = torch.stack([row[number] for row in along.rows])
        away = [furthest(found, wanted, at(number, range(first, first + len(tokens[number]), STEPS)))]
        found = torch.stack([step[number] for step in along.said])
        wanted = said_of(logits, prompt + tokens[number])[first:]
        away.append(furthest(found, wanted, at(number, range(first, first + len(tokens[number])))))
        worst = max([worst or away[0], *away], key=lambda each: each[0])
    return worst


@torch.no_grad()
def answer(model: Any, job: dict[str, Any]) -> tuple[dict[str, Any], numpy.ndarray]:
    """Compute a job: return the entries of answer.json, and the rows."""
    texts, rows = job["texts"], job["rows"]
    print("# the texts", flush=True)
    logs, whole = [], []
    for text, wanted in zip(texts, rows, strict=True):
        logits = alone(model, text)
        logs.append(said_of(logits, text).tolist())
        whole.append(logits[wanted])
    out: dict[str, Any] = {"logprobs": logs, "checks": {}}
    found = torch.cat(whole)
    if job["checks"]:
        print("# texts in one batch, padded on the left", flush=True)
        out["checks"]["left padding"] = in_a_batch(model, texts, rows, whole)
        print("# a prompt in chunks", flush=True)
        longest = max(range(len(texts)), key=lambda number: len(texts[number]))
        out["checks"]["chunks"] = in_chunks(model, texts[longest], whole[longest][-1])
        if out["checks"]["chunks"]:
            out["checks"]["chunks"][1] = longest
    if job["forced"]:
        print(f"# {job['steps']} tokens after each of {len(job['prompts'])} prompts", flush=True)
        out |= along_tokens(model, job["prompts"], job["forced"])
    elif job["steps"]:
        print(f"# {job['steps']} tokens from a cache, {len(job['prompts'])} prompts in one batch", flush=True)
        along = going_on(model, job["prompts"], job["steps"])
        out |= along.entries()
        if job["checks"]:
            out["checks"]["cached decoding"] = decoded(model, job["prompts"], along, out["tokens"])
    return out, found.numpy()


def write(folder: str, out: dict[str, Any], rows: numpy.ndarray) -> None:
    """Write an answer into its folder, answer.json last."""
    numpy.save(Path(folder) / "rows.npy", rows)
    (Path(folder) / "answer.json").write_text(json.dumps(out))


def main(path: str) -> None:
    import transformers

    job = json.loads(Path(path).read_text())
    guard = Absent()
    sys.meta_path.insert(0, guard)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["folder"], dtype=torch.float32, trust_remote_code=job["trust_remote_code"]
        )
        out, rows = answer(in_type(model, job["dtype"]), job)
    finally:
        sys.meta_path.remove(guard)
    write(job["out"], out | {"version": transformers.__version__, "class": type(model).__name__}, rows)


if __name__ == "__main__":
    main(sys.argv[1])
