"""`distill bench steps`: times whole optimizer steps of a recipe's stages, on the Triton kernels and on the references.

The teacher has the published shape and random weights; the text is random tokens in packed documents. Time and memory depend
on neither. Batch, windows and options are the recipe's. Under torchrun or `accelerate launch` the processes share each step
as those of a run do, and the first one prints.
"""

import gc
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from distill import processes
from distill.benchmarks.check import relative_error
from distill.benchmarks.flops import flops_per_token
from distill.benchmarks.measure import ceilings
from distill.benchmarks.targets import learn, without
from distill.build import build
from distill.loading import teacher_config
from distill.recipe import Recipe
from distill.runs.progress import StepReport
from distill.runs.run_dir import versions
from distill.runs.session import make_accelerator
from distill.stages import StageEntry, stages_of
from distill.teacher_type import config_type
from distill.text.windows import Batch
from distill.training.checks import check_fit
from distill.training.fitting import fit_micro_batch
from distill.training.shares import sharded
from distill.training.trainer import Trainer
from students import kernels
from teachers.families import family_of
from teachers.teacher import Teacher

RECIPE = "smollm2-135m_mamba2-hybrid"  # the default
WARM = 2  # steps before the timed ones, which compile kernels and allocate memory
TIMED = 4
TOP = 8  # kernels that a profile names
AGREE = 0.05  # the largest relative difference of a stage's loss between back ends, in the recipe's precision


@dataclass
class RandomText:
    """Random tokens in place of prepared windows, two documents in each window."""

    seq_len: int
    vocabulary: int

    def batch(self, first: int, count: int) -> Batch:
        """A batch of windows; the same `first` gives the same windows."""
        generator = torch.Generator().manual_seed(first)
        ids = torch.randint(self.vocabulary, (count, self.seq_len + 1), generator=generator)
        cut = torch.randint(1, self.seq_len, (count, 1), generator=generator)
        place = torch.arange(self.seq_len)
        documents = (place >= cut).long()
        weights = (place != cut - 1).float()
        return Batch(ids[:, :-1], documents, place - documents * cut, ids[:, 1:], weights, documents)


def run(recipe: Recipe, *, references: bool = True, profile: bool = True) -> dict:
    """Time every training stage of a recipe on every back end of this machine.

    Args:
        references: time the reference implementations too. profile: name the kernels of a step.

    Returns:
        device, versions, the GPU's bf16 ceiling in FLOP/s, and one row for each stage and back end: tokens/s of all
            processes, seconds a step, GiB, loss, kernels, and the share of the ceiling that the FLOP of `flops` reach.

    Raises:
        UserError: the teacher's config cannot be found or read, or a run would refuse the recipe's options.
    """
    cuda = torch.cuda.is_available() and recipe.device != "cpu"
    backends = ["triton", *(["reference"] if references else [])] if cuda else ["reference"]
    rows, top = [], ceilings().flop_per_second if cuda else None
    for entry in stages_of(recipe):
        if not entry.kind.trains:
            continue
        for backend in backends:
            row = {"stage": entry.name, "index": entry.index, "kernels": backend} | _measure(
                recipe, entry, backend, profile and cuda and processes.count() == 1
            )
            if top and "flops" in row:
                row["share"] = round(row["flops"] * row["tokens_per_second"] / row["processes"] / top, 3)
            if not processes.rank():
                print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    device = torch.cuda.get_device_name() if cuda else "CPU"
    return {"recipe": recipe.name, "device": device, "versions": versions(), "flop_per_second": top, "rows": rows}


def all_right(result: Mapping) -> bool:
    """Whether every stage ran on every back end, and each stage's losses agree."""
    losses: dict[tuple, list[float]] = {}
    for row in result["rows"]:
        losses.setdefault((row["stage"], row.get("index")), []).append(row.get("loss", math.nan))
    first = [(torch.tensor(values[0]), torch.tensor(values[-1])) for values in losses.values()]
    return all(relative_error(found, wanted) <= AGREE for found, wanted in first)


def _measure(recipe: Recipe, entry: StageEntry, backend: str, profile: bool) -> dict:
    try:
        with kernels.backend("auto" if backend == "triton" else backend):
            return _steps(recipe, entry, profile)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        gc.collect()  # models, hooks and stage refer to each other, and would take memory in the next measurement
        torch.cuda.empty_cache()


def _steps(recipe: Recipe, entry: StageEntry, profile: bool) -> dict:
    """Time the steps of one stage, on a new student."""
    accelerator = make_accelerator(recipe, None)
    torch.manual_seed(recipe.seed)
    config = teacher_config(recipe)
    teacher = random_teacher(
        config, accelerator.device, config_type(recipe, accelerator.device, cast(torch.dtype | None, config.dtype))
    )
    if recipe.teacher_dtype == "int8":
        teacher.quantise()
    recipe = recipe.model_copy(update={"export": []})  # nothing is written
    fit = check_fit(recipe, teacher)  # no layout is selected: an even one of the same budget takes the same time
    recipe, under = fit.recipe, fit.students[entry.index]
    student, _ = build(teacher, under.layout)
    student.newest = under.newest
    stage = entry.make(teacher, student)
    text = RandomText(entry.seq_len(recipe.data), teacher.config.vocab_size)
    batch, micro = entry.batch(recipe.data), entry.micro_batch(recipe.data)
    learn(recipe, entry, stage, teacher, lambda other: random_teacher(teacher_config(other), accelerator.device))
    stage.prepare()
    with accelerator.autocast():
        stage.begin(lambda tokens: iter([text.batch(0, recipe.data.calibrated).to(accelerator.device)]))
    flops = flops_per_token(stage, stage.running.model if stage.running is not None else None)
    sharding = sharded(recipe, stage, accelerator)
    trainer = Trainer(stage, accelerator, text, 0, batch, micro, sharding)
    if entry.fits_itself(recipe.data):
        fit_micro_batch(trainer, entry, recipe, None, under.layout)
    with without(entry, teacher, student):
        for step in range(WARM):
            trainer.step(step)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reports = [trainer.step(WARM + step) for step in range(TIMED)]
        found = _summary(reports, batch, trainer.micro_batch) | {"flops": flops, "processes": trainer.world}
        found["divided"] = sharding is not None
        if profile:
            found["profile"] = list(_profile(trainer))
    return found


def _summary(reports: list[StepReport], batch: int, micro: int) -> dict:
    seconds = sorted(report.seconds for report in reports)[len(reports) // 2]
    found = {"batch": batch, "micro_batch": micro, "loss": reports[0].loss, "seconds": round(seconds, 4)}
    found["tokens_per_second"] = round(reports[0].tokens / seconds)
    if torch.cuda.is_available():
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _profile(trainer: Trainer) -> Iterator[dict]:
    """The kernels that take the most GPU time in one step, with their shares of it, and all others together."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        trainer.step(WARM + TIMED)
        torch.cuda.synchronize()
    kernels_run = [event for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    times = {event.key: event.self_device_time_total for event in kernels_run}
    whole = sum(times.values())
    ranked = sorted(times.items(), key=lambda entry: -entry[1])
    for key, taken in ranked[:TOP]:
        yield {"kernel": key[:80], "ms": round(taken / 1e3, 2), "share": round(taken / whole, 3)}
    rest = sum(taken for _, taken in ranked[TOP:])
    yield {"kernel": f"{max(len(ranked) - TOP, 0)} others", "ms": round(rest / 1e3, 2), "share": round(rest / whole, 3)}


def random_teacher(config: PretrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Teacher:
    """A teacher of a published shape, with random weights and without a tokenizer."""
    name = config.model_type
    family = family_of(config, name)
    attention = {} if family.attention is None else {"attn_implementation": family.attention}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
    model = model.float() if dtype == torch.float32 else model  # else it has the dtype already; rotary tables stay float32
    return Teacher(name, model.requires_grad_(False).eval(), None, family)


def table(result: Mapping) -> Table:
    """What `run` returned, as a table."""
    found = Table(title=f"{result['recipe']}, {result['device']}", box=None)
    for name in ("stage", "kernels", "windows", "tokens/s", "ms a step", "GiB", "of the ceiling", "loss", ""):
        found.add_column(name, justify="left" if name in ("stage", "kernels", "") else "right")
    for row in result["rows"]:
        if "failed" in row:
            found.add_row(row["stage"], row["kernels"], *[""] * 6, row["failed"])
            continue
        numbers = (
            f"{row['tokens_per_second']:,}",
            f"{1e3 * row['seconds']:.0f}",
            str(row.get("gib", "")),
            f"{row['share']:.0%}" if "share" in row else "",
            f"{row['loss']:.4f}",
        )
        found.add_row(row["stage"], row["kernels"], f"{row['batch']} / {row['micro_batch']}", *numbers, "")
    return found
