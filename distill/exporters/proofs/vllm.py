"""Proof in vLLM, as a plain script: `python vllm.py JOB.json` in an environment that has vLLM and numpy.

It writes the answer that `answer.py` reads: the log-probabilities of the texts, and the tokens after all prompts, in one
batch. vLLM gives log-probabilities and no logits; whole distributions are computed for the first text only. Where a
generated token differs from the one of `forced`, generation begins again after the forced one.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

AGAIN = 20  # the most times that generation begins again


def declare_torchvision() -> Any:
    """Declare the operators for which torchvision registers fakes when it is imported.

    A torchvision built for another torch lacks them, and vLLM imports torchvision for some models, even for text alone.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        name = operator.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(operator)
    return library  # the declarations live as long as it does


def inspect_here() -> None:
    """Make vLLM inspect a model's class in this process: the process that it would start lacks the declarations."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # the name in vLLM 0.32


def check_torchvision(folder: str) -> None:
    """Exit with a message if vLLM imports torchvision for the model, and it is not installed."""
    kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type", "")
    if kind.startswith("qwen3_5") and importlib.util.find_spec("torchvision") is None:
        raise SystemExit(
            f"vLLM imports torchvision for {kind}, but {sys.executable} has none; pip install --no-deps torchvision there"
        )


def working(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        __import__(name)
    except Exception:
        return False
    return True


def distributions(found: Any, positions: list[int], size: int) -> numpy.ndarray:
    """Return the log-probabilities after some positions of a prompt. [positions, vocabulary]"""
    rows = numpy.full((len(positions), size), -1e4, numpy.float32)
    for row, position in zip(rows, positions, strict=True):  # vLLM's entry of a position predicts its token
        part = slice(found.start_indices[position + 1], found.end_indices[position + 1])
        row[numpy.asarray(found.token_ids[part])] = numpy.maximum(numpy.asarray(found.logprobs[part], numpy.float32), -1e4)
    return rows


def said(engine: Any, job: dict[str, Any], make: Callable[..., Any]) -> tuple[list[list[float]], numpy.ndarray]:
    """Return the log-probabilities of the texts, and the distributions at the first text's rows."""
    texts = [{"prompt_token_ids": text} for text in job["texts"]]
    asked = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "flat_logprobs": True, "detokenize": False}
    logs = []
    for text, out in zip(
        job["texts"], engine.generate(texts, make(prompt_logprobs=0, **asked), use_tqdm=False), strict=True
    ):
        found = out.prompt_logprobs
        # the first entry of each position is the text's own token
        logs.append([found.logprobs[found.start_indices[place]] for place in range(1, len(text))])
    size = engine.llm_engine.model_config.get_vocab_size()
    positions = [row for row in job["rows"][0] if row + 1 < len(job["texts"][0])]
    (out,) = engine.generate(texts[:1], make(prompt_logprobs=-1, **asked), use_tqdm=False)
    return logs, distributions(out.prompt_logprobs, positions, size)


def going_on(engine: Any, job: dict[str, Any], make: Callable[..., Any]) -> list[list[int]]:
    """Return the token of each step after every prompt, given the tokens of `forced` before it. [prompts, steps]"""
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
