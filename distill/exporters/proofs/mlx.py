"""Proof in MLX, as a plain script: `python mlx.py JOB.json` in an environment that has mlx-lm and numpy.

It writes the answer that `answer.py` reads: the logits of the texts, and the tokens after all prompts, in one of mlx-lm's
own batches of prompts of unequal length.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_model


class Along:
    """A sampler that takes given tokens one after the other, and records the most likely token of each step."""

    def __init__(self, forced: list[int] | None) -> None:
        self.forced = forced
        self.own: list[mx.array] = []

    def __call__(self, logprobs: mx.array) -> mx.array:
        best = mx.argmax(logprobs, axis=-1)
        at = len(self.own)
        self.own.append(best)
        if self.forced is None or at >= len(self.forced):
            return best
        return mx.array([self.forced[at]], dtype=best.dtype)


def said(model: Any, text: list[int], rows: list[int]) -> tuple[list[float], numpy.ndarray]:
    """Return the log-probabilities of a text's tokens but the first, and the logits of the positions `rows`."""
    logits = model(mx.array([text]))[0].astype(mx.float32)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    taken = mx.take_along_axis(logs[:-1], mx.array(text[1:])[:, None], axis=-1)[:, 0]
    return numpy.array(taken).tolist(), numpy.array(logits[mx.array(rows)])


def going_on(model: Any, job: dict[str, Any]) -> list[list[int]]:
    """Return the most likely token of each step after every prompt, all in one batch. [prompts, steps]"""
    steps, prompts = job["steps"], job["prompts"]
    along = [Along(job["forced"][number] if job["forced"] else None) for number in range(len(prompts))]
    batch = BatchGenerator(model, max_tokens=steps)
    waiting = set(batch.insert(prompts, samplers=along))
    while waiting:
        _, answers = batch.next()
        waiting -= {answer.uid for answer in answers if answer.finish_reason is not None}
    batch.close()
    return [[int(token.item()) for token in each.own[:steps]] for each in along]


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    print("# loading", flush=True)
    folder = Path(job["folder"])
    code = "model_file" in json.loads((folder / "config.json").read_text())
    # mlx-lm runs a file of the folder that names the model's class only with trust_remote_code
    model, _ = load_model(folder, **({"trust_remote_code": True} if code else {}))
    dtype = getattr(mx, job["dtype"])
    model.update(
        tree_map(lambda each: each.astype(dtype) if mx.issubdtype(each.dtype, mx.floating) else each, model.parameters())
    )
    model.eval()
    print("# the texts", flush=True)
    answers = [said(model, text, rows) for text, rows in zip(job["texts"], job["rows"], strict=True)]
    out = {"version": importlib.metadata.version("mlx-lm"), "logprobs": [logs for logs, _ in answers], "checks": {}}
    if job["steps"]:
        print(f"# {job['steps']} tokens, {len(job['prompts'])} prompts in one batch", flush=True)
        out["own"] = going_on(model, job)
    numpy.save(Path(job["out"]) / "rows.npy", numpy.concatenate([rows for _, rows in answers]))
    (Path(job["out"]) / "answer.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1])
