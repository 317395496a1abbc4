"""Proof in vLLM, as a plain script: `python vllm.py JOB.json` in an environment that has vLLM and numpy.

It answers what `answer.py` reads: what the model says of the texts, and what it goes on with, all prompts in one batch. vLLM
gives log-probabilities, no logits; whole distributions are asked for of the first text alone. At a token that is not
the one of `forced`, generation begins again behind that one.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

AGAIN = 20  # times that generation may begin again


def declare_torchvision() -> Any:
    """Declare the operators that torchvision registers fakes for when it is imported: a build of it for another torch than
    the installed one lacks them, and vLLM imports it for some models, text alone or not."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        name = operator.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(operator)
    return library  # what is declared goes with it


def inspect_here() -> None:
    """Have vLLM look at a model's class in this process: in the one that it starts for that, nothing is declared."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # as vLLM 0.32 calls it


def check_torchvision(folder: str) -> None:
    """End with what is missing where vLLM imports torchvision for a model, text alone or not, and there is none."""
    kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type", "")
    if kind.startswith("qwen3_5") and importlib.util.find_spec("torchvision") is None:
        raise SystemExit(
            f"vLLM imports torchvision for {kind}, and {sys.executable} has none; pip install --no-deps torchvision there"
        )


def working(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        __import__(name)
    except Exception:
        return False
    return True


def distributions(found: Any, positions: list[int], size: int) -> numpy.ndarray:
    """Log-probabilities behind some positions of a prompt. [positions, vocabulary]"""
    rows = numpy.full((len(positions), size), -1e4, numpy.float32)
    for row, position in zip(rows, positions, strict=True):  # an entry is what was said of the token that stands there
        part = slice(found.start_indices[position + 1], found.end_indices[position + 1])
        row[numpy.asarray(found.token_ids[part])] = numpy.maximum(numpy.asarray(found.logprobs[part], numpy.float32), -1e4)
    return rows


def said(engine: Any, job: dict[str, Any], make: Callable[..., Any]) -> tuple[list[list[float]], numpy.ndarray]:
    """Log-probabilities of the texts, and the distributions of the first one's rows."""
    texts = [{"prompt_token_ids": text} for text in job["texts"]]
    asked = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "flat_logprobs": True, "detokenize": False}
    logs = []
    for text, out in zip(
        job["texts"], engine.generate(texts, make(prompt_logprobs=0, **asked), use_tqdm=False), strict=True
    ):
        found = out.prompt_logprobs
        # the token that stands there comes first of each position's
        logs.append([found.logprobs[found.start_indices[place]] for place in range(1, len(text))])
    size = engine.llm_engine.model_config.get_vocab_size()
    positions = [row for row in job["rows"][0] if row + 1 < len(job["texts"][0])]
    (out,) = engine.generate(texts[:1], make(prompt_logprobs=-1, **asked), use_tqdm=False)
    return logs, distributions(out.prompt_logprobs, positions, size)


def going_on(engine: Any, job: dict[str, Any], make: Callable[..., Any]) -> list[list[int]]:
    """What each prompt is gone on with, given the tokens of `forced` before every token. [prompts, steps]"""
    steps, forced = job["steps"], job["forced"]
    own: list[list[int]] = [[] for _ in job["prompts"]]
    for _ in range(AGAIN):
        open_ones = [number for number, found in enumerate(own) if len(found) < steps]
        if not open_ones:
            break
        prompts = [
            {"prompt_token_ids": job["prompts"][number] + (forced[number][: len(own[number])] if forced else [])}
            for number in open_ones
        ]
        asked = [
            make(max_tokens=steps - len(own[number]), temperature=0.0, ignore_eos=True, detokenize=False)
            for number in open_ones
        ]
        for number, out in zip(open_ones, engine.generate(prompts, asked, use_tqdm=False), strict=True):
            for token in out.outputs[0].token_ids:
                own[number].append(token)
                if forced and token != forced[number][len(own[number]) - 1]:
                    break
    return own


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    check_torchvision(job["folder"])
    declared = None if working("torchvision") else declare_torchvision()
    import vllm

    if declared is not None:
        inspect_here()
    print("# loading", flush=True)
    longest = max(len(text) for text in job["texts"] + job["prompts"]) + job["steps"] + 1
    engine = vllm.LLM(
        model=job["folder"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=max(4, len(job["prompts"])),
        max_logprobs=-1,
        enable_prefix_caching=False,
        trust_remote_code=job["trust_remote_code"],
        seed=0,
    )
    print("# the texts", flush=True)
    logs, rows = said(engine, job, vllm.SamplingParams)
    out = {"version": vllm.__version__, "logprobs": logs, "checks": {}}
    if job["steps"]:
        print(f"# {job['steps']} tokens, {len(job['prompts'])} prompts in one batch", flush=True)
        out["own"] = going_on(engine, job, vllm.SamplingParams)
    numpy.save(Path(job["out"]) / "rows.npy", rows)
    (Path(job["out"]) / "answer.json").write_text(json.dumps(out))
    del declared


if __name__ == "__main__":
    main(sys.argv[1])
