"""Speed and memory by length and batch: prefill, first token, decoding, and the size of the cache.

Prompts are random tokens. `prefill_seconds` is the time of the forward pass over the prompt that fills the cache.
`first_token_seconds` adds the head's choice of the next token. Both run in chunks, as in `generate` (`students.prompts`).
`decode_tokens_per_second` is measured over greedy steps after that, and counts the whole batch. Numbers are medians of three
on a GPU, and one measurement on a CPU.

Both models run eagerly, with transformers' attention (sdpa where the family has it) and this project's kernels as `distill
doctor` lists them, without torch.compile. On a GPU both are copies in bfloat16, except decays and scales. There
`graph_decode_tokens_per_second` is measured over as many further tokens, each replayed as one CUDA graph
(`students.Decoder`, warmed up and captured before); `graph_not_run` says why it is missing.

Memory is what the eager calls take beyond the weights: by CUDA's allocator, or by the process's resident set where Linux
lets its peak be reset, else null.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from distill.compat import kept_in_float32
from distill.evaluation.comparison import crossovers
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.speed_table import speed_table
from distill.evaluation.suite import Suite
from distill.memory import ran_out
from distill.output_head import head_of
from distill.text.heldout import Heldout
from students.compat import CACHE
from students.decoding import Decoder, GraphError
from students.kernels.linear_kl import Head
from students.kernels.linear_kl.reference import logits_of
from students.prompts import hidden_states, new_cache
from students.skeleton import Student
from teachers.teacher import Teacher

CPU_LENGTH = 1024  # the longest length that is measured on a CPU
DECODE_STEPS = {"cpu": 4, "cuda": 32}
REPEATS = {"cpu": 1, "cuda": 3}

M = TypeVar("M", bound=PreTrainedModel)


class Speed(Evaluation):
    """Speed and memory of teacher and student."""

    suites = ("standard", "full")

    def measure(self, teacher: Teacher, model: Student | None, heldout: Heldout | None, suite: Suite) -> dict:
        return row(teacher, model, heldout, suite)

    def divides(self, suite: Suite) -> bool:
        return False  # other processes would only share the machine

    def beside(self, own: Any, teacher: Any) -> dict[str, Any]:
        return {"speed": crossovers(own["cells"], teacher["cells"])}

    def left_out(self, results: Any) -> Iterator[tuple[str, str]]:
        for cell in results.get("cells", []):
            for key, how in (("not_run", ""), ("graph_not_run", ", as CUDA graphs")):
                if key in cell:
                    yield f"length {cell['length']}, batch {cell['batch']}{how}", cell[key]

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        yield "speed, student | teacher", speed_table(judged)


@torch.no_grad()
def row(teacher: Teacher, model: Student | None, heldout: Heldout | None, suite: Suite) -> dict:
    """Measure one model. model: None measures the teacher.

    Returns:
        device, method, and cells, a list of {length, batch, prefill_seconds, first_token_seconds,
        decode_tokens_per_second, peak_bytes, cache_bytes}, or of {length, batch, not_run}; on a GPU with
        graph_decode_tokens_per_second or graph_not_run.
    """
    device = teacher.device
    original = teacher.model if model is None else model
    timed = in_bfloat16(original) if device.type == "cuda" else original
    longest = teacher.config.max_position_embeddings if teacher.family.rope is None else None
    decoded = DECODE_STEPS.get(device.type, 4) * (2 if device.type == "cuda" else 1)
    graphs = "decoding also as CUDA graphs" if device.type == "cuda" else "no CUDA graphs"
    cells = []
    with torch.autocast(device.type, enabled=False):
        for batch in suite.batches:
            for length in suite.speed:
                reason = _refused(length + decoded, length, device, longest)
                found = {"not_run": reason} if reason else _cell(timed, length, batch)
                cells.append({"length": length, "batch": batch, **found})
    return {"device": _name(device), "method": f"eager, {graphs}", "cells": cells}


def in_bfloat16(model: M) -> M:
    """Return a copy in bfloat16, except the buffers and the parameters that a model keeps in float32."""
    return narrowed(copy.deepcopy(model))


def narrowed(model: M) -> M:
    """Change a model to bfloat16 in place, as `in_bfloat16` does a copy."""
    kept = kept_in_float32(model)
    for name, parameter in model.named_parameters():
        if not set(kept) & set(name.split(".")) and type(parameter) is nn.Parameter:  # an int8 weight stays one
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def held_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors that a cache's layers hold."""
    tensors: dict[int, Tensor] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            found = value.values() if isinstance(value, dict) else [value]
            tensors |= {id(tensor): tensor for tensor in found if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _refused(needed: int, length: int, device: torch.device, positions: int | None) -> str | None:
    if device.type == "cpu" and length > CPU_LENGTH:
        return f"a CPU is timed only up to {CPU_LENGTH} tokens"
    if positions and needed > positions:
        return f"the model has learned positions for only {positions} tokens"
    return None


def _cell(model: PreTrainedModel, length: int, batch: int) -> dict:
    """Measure one length and batch, after a warm-up at that shape on a GPU."""
    device = model.device
    try:
        if device.type == "cuda":
            _measure(model, length, batch)
        runs = [_measure(model, length, batch) for _ in range(REPEATS.get(device.type, 1))]
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return {"not_run": "out of memory"}
    rates = [name for name in runs[-1] if name.endswith("seconds") or name.endswith("per_second")]
    medians = {name: statistics.median(run[name] for run in runs if name in run) for name in rates}
    return {**runs[-1], **medians}


def _measure(model: PreTrainedModel, length: int, batch: int) -> dict:
    device, cache = model.device, new_cache(model)
    steps = DECODE_STEPS.get(device.type, 4)
    before = start_peak(device)
    token, measured = prompted(model, random_text(model, batch, length), cache)
    token, rate = eager_rate(model, cache, token, steps)
    found: dict[str, Any] = measured | {
        "decode_tokens_per_second": rate,
        "peak_bytes": end_peak(device, before),
        "cache_bytes": held_bytes(cache),
    }
    return found | (graph_rate(model, cache, token, steps) if device.type == "cuda" else {})


def random_text(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Return random tokens on a model's device, the same ones every time."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=draw).to(model.device)


def prompted(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int | None = None) -> tuple[Tensor, dict[str, float]]:
    """Return the first token after a prompt, in chunks as in `generate`, and the seconds without and with the head."""
    began = now(model.device)
    hidden = hidden_states(model, ids, cache, last=True, chunk=chunk)
    filled = now(model.device)
    token = _choice(hidden, head_of(model))
    return token, {"prefill_seconds": filled - began, "first_token_seconds": now(model.device) - began}


def eager_rate(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int) -> tuple[Tensor, float]:
    """Take greedy steps after a cache. Returns the last token, and tokens a second."""
    head, hidden_of = head_of(model), _through(model)
    began = now(model.device)
    for _ in range(steps):
        token = _choice(hidden_of(token, cache), head)
    return token, len(token) * steps / (now(model.device) - began)


def graph_rate(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int) -> dict:
    """Return the rate of further greedy steps after a cache, each a replayed graph on a GPU, or why there is none."""
    try:
        decode = Decoder(model, cache, steps)
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            return {"graph_not_run": "out of memory"}
        if not isinstance(error, GraphError):
            raise
        return {"graph_not_run": str(error)}
    began = now(model.device)
    for _ in range(steps):
        token = decode(token).argmax(-1)[:, None]
    return {"graph_decode_tokens_per_second": len(token) * steps / (now(model.device) - began)}


def _through(model: PreTrainedModel) -> Callable[[Tensor, Cache], Tensor]:
    """Return a function that gives the last hidden states of tokens after a cache, for a teacher or a student."""
    if hasattr(model, "new_cache"):  # a student, whose skeleton does not know meta tokens and shared keys
        student = cast(Student, model)
        return lambda ids, cache: student.hidden(ids, None, cache)
    return lambda ids, cache: cast(Any, model).base_model(input_ids=ids, use_cache=True, **{CACHE: cache}).last_hidden_state


def _choice(hidden: Tensor, head: Head) -> Tensor:
    return logits_of(hidden[:, -1], head).argmax(-1)[:, None]


def now(device: torch.device) -> float:
    """Return the clock's seconds, after a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start_peak(device: torch.device) -> int | None:
    """Reset the peak of memory. Returns the bytes in use now, or None if they cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:  # no Linux, or not allowed
        return None


def end_peak(device: torch.device, before: int | None) -> int | None:
    """Return the peak of memory since `start_peak`, less the bytes that were in use then."""
    if before is None:
        return None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return max(0, peak - before)


def _resident(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
