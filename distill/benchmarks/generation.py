"""`distill bench generation`: the speed of generation of a recipe's teacher and its students, before any training.

Models have the published shape and random weights, in bfloat16 on a GPU and float32 on a CPU; text is random tokens. Time
and memory depend on neither. Teacher and students run on the same kernels (`students.Decoder`, prompts in chunks). `limit`
is the rate at which the device's bandwidth allows the weights and the cache to be read once a token; `share` is the best
rate divided by it. A large batch is made of at most GROUP prompts, computed once, whose caches are repeated: decoding rates
are measured on the whole batch, and the time of its prompts is scaled up from the group's.
"""

import gc
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.benchmarks.comparison import TEACHER, compare, table
from distill.benchmarks.measure import copied
from distill.benchmarks.protocols import Protocol, protocol
from distill.benchmarks.sizes import most_texts, sizes_of
from distill.benchmarks.steps import random_teacher
from distill.build import build, count_parameters, empty
from distill.errors import UserError
from distill.evaluation.speed import (
    eager_rate,
    end_peak,
    graph_rate,
    held_bytes,
    narrowed,
    prompted,
    random_text,
    start_peak,
)
from distill.loading import teacher_config
from distill.memory import ran_out
from distill.recipe import Recipe
from distill.runs.run_dir import versions
from distill.selection.resolution import even_recipe
from distill.stages.layouts import first_layout, layouts_of
from students.config import Layout
from students.prompts import new_cache
from students.state_size import limit
from teachers.teacher import Teacher

__all__ = ["RECIPE", "all_right", "run", "table"]

RECIPE = "smollm2-135m_mamba2-hybrid"  # the default
LENGTHS = {"cuda": (2048, 16_384, 65_536, 131_072), "cpu": (64, 256)}
STEPS = {"cuda": 32, "cpu": 4}  # tokens that a rate is measured over
GROUP = {"cuda": 8, "cpu": 2}  # prompts that are computed for a larger batch
QUICK = 5.0  # seconds: a shorter prompt is timed again and the faster time counts, since libraries plan each new shape


def run(
    recipes: Sequence[tuple[str, Recipe]],
    *,
    lengths: str | Sequence[int] | None = None,
    batches: str | Sequence[int] = (1,),
    protocols: Sequence[str] = (),
    prefill_chunk: int | None = None,
) -> dict:
    """Measure the teachers of some recipes and their students.

    Args:
        recipes: each with the name of its row. lengths: tokens of the prompts. batches: batch sizes. protocols: papers'
            measurements, see `distill.benchmarks.protocols`. prefill_chunk: columns of a prompt that are read at a time.

    Returns:
        device, versions, bandwidth {bytes_per_second, source}, stopped (where it was interrupted and rows are missing), and
        one row for each model: model, teacher, pattern, parameters, weight_bytes and cells. A cell has length, batch, limit
        and either not_run or first_token_seconds, peak_bytes, cache_bytes, eager and graph (tokens a second of the whole
        batch) or graph_not_run, share, with_prompts (the rate with the prompts' time), against_teacher (see
        `comparison.compare`), and for a protocol paper, what the paper reported.

    Raises:
        UserError: a teacher's config cannot be found, a protocol is unknown, a number is not whole and positive, or a layout
            does not fit.
    """
    lengths, batches = None if lengths is None else numbers(lengths, "--lengths"), numbers(batches, "--batches")
    if prefill_chunk is not None:
        numbers([prefill_chunk], "--prefill-chunk")
    wanted = [(name, part) for name in protocols for part in protocol(name)]
    for name, recipe in recipes:
        _check(name, recipe)
    device = _device(recipes)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in runs; cuDNN also plans each length anew, 0.1 s a token
    bandwidth = _bandwidth(device)
    lengths = (() if wanted else LENGTHS[device.type]) if lengths is None else lengths
    asked = {"lengths": lengths, "batches": batches, "protocols": wanted, "chunk": prefill_chunk}
    rows: list[dict] = []
    found: dict[str, Any] = {"device": _name(device), "versions": versions(), "bandwidth": bandwidth}
    try:
        for each, of in _models(recipes):
            print(f"measuring {each} ({of.teacher})", file=sys.stderr, flush=True)
            row = _row(each, of, device, asked, bandwidth["bytes_per_second"])
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    except KeyboardInterrupt:
        if not rows:
            raise
        found["stopped"] = True
    compare(rows)
    return found | {"rows": rows}


def _models(recipes: Sequence[tuple[str, Recipe]]) -> Iterator[tuple[str, Recipe]]:
    """The models to measure: each teacher before its first student."""
    teachers = set()
    for name, recipe in recipes:
        if recipe.teacher not in teachers:
            yield TEACHER, recipe
        teachers.add(recipe.teacher)
        yield name, recipe


def _device(recipes: Sequence[tuple[str, Recipe]]) -> torch.device:
    cuda = torch.cuda.is_available() and all(recipe.device != "cpu" for _, recipe in recipes)
    return torch.device("cuda" if cuda else "cpu")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _bandwidth(device: torch.device) -> dict[str, Any]:
    """The bandwidth for `limit`, and its source."""
    if device.type == "cuda" and "H100" in torch.cuda.get_device_name():
        return {"bytes_per_second": 3.0e12, "source": "an H100's"}
    return {"bytes_per_second": copied(device), "source": "a copy on this device"}


@torch.no_grad()
def _row(name: str, recipe: Recipe, device: torch.device, asked: Mapping[str, Any], bandwidth: float) -> dict:
    """One model's measurements; its memory is freed afterwards."""
    model = _model(name, recipe, device)
    try:
        sizes = sizes_of(model)
        row: dict[str, Any] = {
            "model": name,
            "teacher": recipe.teacher,
            "pattern": getattr(getattr(model, "layout", None), "pattern", None),
            "parameters": count_parameters(model),
            "weight_bytes": sizes.weights(1),
            "cells": [],
        }
        _warm_up(model, asked["chunk"])
        plain = [
            Protocol(length, STEPS[device.type], batch, {}) for batch in asked["batches"] for length in asked["lengths"]
        ]
        for paper, part in [*((None, part) for part in plain), *asked["protocols"]]:
            for cell in _cells(model, part, sizes, asked["chunk"], halved=paper is not None):
                cell["limit"] = limit(sizes.weights(cell["batch"]), sizes.cache(part.prompt), cell["batch"], bandwidth)
                if rates := [cell[key] for key in ("eager", "graph") if key in cell]:
                    cell["share"] = max(rates) / cell["limit"]
                row["cells"].append({**({} if paper is None else {"protocol": paper, "paper": part.papers}), **cell})
        return row
    finally:
        del model
        _give_back()


def _model(name: str, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """A recipe's teacher, or its student, with random weights."""
    torch.manual_seed(recipe.seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = random_teacher(teacher_config(recipe), device, dtype)
    if name == TEACHER:
        return teacher.model
    student, _ = build(teacher, _layout(recipe, teacher))
    return narrowed(student) if dtype == torch.bfloat16 else student


def _layout(recipe: Recipe, teacher: Teacher) -> Layout:
    if recipe.selects:  # no layout is selected here: an even layout of the same budget takes the same time
        recipe = even_recipe(recipe, teacher.n_layers, teacher.config.num_attention_heads)
    first = first_layout(recipe, teacher.n_layers, recipe.name)
    return [first, *layouts_of(recipe, first, recipe.name)][-1]


def _check(name: str, recipe: Recipe) -> None:
    """Refuse a layout before anything is timed.

    Raises:
        UserError: naming the row.
    """
    try:
        teacher = random_teacher(teacher_config(recipe), torch.device("meta"))
        empty(teacher, _layout(recipe, teacher))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _warm_up(model: PreTrainedModel, chunk: int | None) -> None:
    """Compile the kernels before anything is timed."""
    length = 512 if model.device.type == "cuda" else 8
    cache = new_cache(model)
    token, _ = prompted(model, random_text(model, 1, length), cache, chunk)
    eager_rate(model, cache, token, 2)


def _cells(model: PreTrainedModel, part: Protocol, sizes, chunk: int | None, *, halved: bool) -> Iterator[dict]:
    """The cells of one length. halved: if the batch does not fit, try smaller ones until one does."""
    batch = part.batch or most_texts(model, sizes, part.prompt + part.tokens)
    while True:
        cell = {"length": part.prompt, "batch": batch, **_guarded(model, batch, part, chunk)}
        if not halved or "not_run" not in cell or batch == 1:
            yield cell
            return
        batch = batch // 2 if part.batch else max(1, int(0.8 * batch) // 8 * 8)


def _guarded(model: PreTrainedModel, batch: int, part: Protocol, chunk: int | None) -> dict:
    """One cell, or why there is none."""
    if refusal := _refusal(model, part):
        return {"not_run": refusal}
    try:
        return _measure(model, batch, part, chunk)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        reason = "out of memory"
    _give_back()
    return {"not_run": reason}


def _refusal(model: PreTrainedModel, part: Protocol) -> str | None:
    positions = getattr(model.config, "n_positions", None)
    if positions and part.prompt + 2 * part.tokens > positions:
        return f"the model has learned positions for {positions} tokens"
    return None


def _measure(model: PreTrainedModel, batch: int, part: Protocol, chunk: int | None) -> dict:
    device = model.device
    group = math.gcd(batch, GROUP[device.type]) if batch > GROUP[device.type] else batch
    before, ids = start_peak(device), random_text(model, group, part.prompt)
    cache = new_cache(model)
    token, times = prompted(model, ids, cache, chunk)
    peak, seconds = end_peak(device, before), times["first_token_seconds"]
    if seconds < QUICK:
        cache = new_cache(model)
        token, times = prompted(model, ids, cache, chunk)
        seconds = min(seconds, times["first_token_seconds"])
    found: dict[str, Any] = {
        "prompts": group,
        "first_token_seconds": seconds * batch / group,
        "peak_bytes": peak,
        "cache_bytes": held_bytes(cache) * batch // group,
    }
    if batch > group:
        cache.batch_repeat_interleave(batch // group)
        token = token.repeat_interleave(batch // group, 0)
    if batch == group or device.type == "cpu":  # for a large batch eager decoding takes memory and is slower
        token, found["eager"] = eager_rate(model, cache, token, min(part.tokens, STEPS[device.type]))
    if device.type == "cuda":
        rate = graph_rate(model, cache, token, part.tokens)
        found |= {name.replace("graph_decode_tokens_per_second", "graph"): value for name, value in rate.items()}
        if rate.get("graph_not_run") == "out of memory" and batch > group:
            raise torch.OutOfMemoryError
    best = max(found.get("eager", 0.0), found.get("graph", 0.0))
    if best:
        whole = found["first_token_seconds"] + batch * part.tokens / best
        found["with_prompts"] = batch * part.tokens / whole
    return found


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def all_right(result: Mapping) -> bool:
    """Whether every model has a measurement."""
    return all(any("not_run" not in cell for cell in row["cells"]) for row in result["rows"])


def numbers(text: str | Sequence[int], option: str) -> list[int]:
    """Whole numbers, 1 or more, from text such as "2048,16k" (k: 1,024).

    Raises:
        UserError: a part is not such a number. The message names it and the option.
    """
    found = []
    for part in text.split(",") if isinstance(text, str) else text:
        digits, times = (str(part).strip().lower(), 1)
        if digits.endswith("k"):
            digits, times = digits[:-1], 1024
        if not digits.isdecimal() or int(digits) < 1:
            raise UserError(f"{option} has {part!r}; give whole numbers from 1 on, such as 2048,16k (k: 1,024)")
        found.append(int(digits) * times)
    return found
