"""The device memory of a training stage, measured by running the stage on fake tensors, which have shapes but no values.

The stage's own forward and backward passes run on a CPU, without weights, in seconds. Every storage that an operation makes
is counted until it is freed (`ledger`), including the kernels' memory without their launches (`students.kernels.on_paper`),
under a GPU's autocast rules (`autocast`). Layers of one kind take the same memory, so only a few are run (`layers`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from distill import moments
from distill.compat import FakeTensorMode, run_backward
from distill.footprint.autocast import WideAsOnAGpu
from distill.footprint.divisors import most_windows
from distill.footprint.layers import extrapolated
from distill.footprint.ledger import Ledger
from distill.footprint.shapes import student_of, teacher_of, text_of
from distill.recipe import Recipe
from distill.stages import StageEntry
from distill.stages.stage import Stage
from distill.teacher_type import config_type
from distill.text.windows import Batch
from students import kernels
from students.config import Layout
from teachers.families import Family

__all__ = ["Footprint", "Shape", "footprint", "most_windows"]

WORKSPACE = 2**25  # bytes of cuBLAS's workspace on a Hopper GPU
COMPILED = 0.8  # share of the counted activations that compiled layers keep: measured 65.0 GiB, counted 76.1


@dataclass(frozen=True)
class Footprint:
    """The bytes at the memory peak of a training stage's steps.

    teacher: the teacher's weights. student: the student's weights that it does not share with the teacher, including
    `trained`, the trained ones. gradients, moments: of the trained weights (AdamW's two moments). activations: all the rest,
    including the head's buffers and the kernels' temporaries.
    """

    teacher: float
    student: float
    trained: float
    gradients: float
    moments: float
    activations: float

    @property
    def peak(self) -> float:
        """The total."""
        return self.teacher + self.student + self.gradients + self.moments + self.activations

    def sharded(self, processes: int, teacher_too: bool = False) -> "Footprint":
        """The footprint on each of `processes` GPUs, which divide the trained weights, their gradients and moments, and with
        `teacher_too` the teacher."""
        kept = self.student - self.trained
        shares = {name: getattr(self, name) / processes for name in ("trained", "gradients", "moments")}
        return Footprint(
            self.teacher / (processes if teacher_too else 1),
            kept + shares["trained"],
            activations=self.activations,
            **shares,
        )


@dataclass(frozen=True)
class Shape:
    """The models and the arithmetic of a footprint: a teacher's config and family, the student's layout, and precision.

    dtype: of the teacher's weights. newest: the layers that were converted last; all by default.
    gpu: compute as on a Hopper GPU with Triton kernels, else as on a CPU.
    """

    config: PretrainedConfig
    family: Family
    layout: Layout
    dtype: torch.dtype = torch.float32
    autocast: bool = True
    gpu: bool = True
    newest: tuple[int, ...] | None = None

    @classmethod
    def of(cls, recipe: Recipe, config: PretrainedConfig, family: Family, layout: Layout, gpu: bool = True) -> "Shape":
        """The shape for a recipe, with its precision and the type of its teacher's weights."""
        wide = recipe.precision == "float32" or (recipe.precision == "auto" and not gpu)
        return cls(
            config,
            family,
            layout,
            config_type(recipe, "cuda" if gpu else "cpu", cast(torch.dtype | None, config.dtype)),
            not wide,
            gpu,
        )


def footprint(shape: Shape, entry: StageEntry, seq_len: int, windows: int, accumulates: bool = True) -> Footprint:
    """Measure the memory of a training stage with `windows` windows at a time.

    Args:
        accumulates: whether a step has several micro-batches, so that gradients exist while the next one is computed.

    Raises:
        Exception: of any type, if the model cannot run on fake tensors.
    """
    whole = extrapolated(shape, lambda part: _measured(part, entry, seq_len, windows, accumulates))
    base = {field.name: whole[field.name] for field in fields(Footprint) if field.name != "activations"}
    held = sum(base[name] for name in ("teacher", "student", "gradients", "moments"))
    highest = max(whole[when] for when in ("forward", "backward", "end"))
    kept = COMPILED if shape.gpu and _fuses(entry) else 1.0
    return Footprint(activations=kept * max(0.0, highest + WORKSPACE * shape.gpu - held), **base)


def _fuses(entry: StageEntry) -> bool:
    """Whether a stage trains the whole student with compiled layers and without recomputation."""
    options = entry.options
    recomputed = getattr(options, "activation_checkpointing", False)
    return entry.kind.whole_student and getattr(options, "compile", None) is not False and not recomputed


def _measured(shape: Shape, entry: StageEntry, seq_len: int, windows: int, accumulates: bool) -> dict[str, float]:
    """The bytes by kind, the peaks of the forward and the backward pass, and the bytes at the end."""
    paper: AbstractContextManager = kernels.on_paper() if shape.gpu else kernels.backend("reference")
    with torch.random.fork_rng(devices=[]), paper, FakeTensorMode(allow_non_fake_inputs=True), Ledger(shape.gpu) as ledger:
        teacher = teacher_of("", shape.config, shape.family, shape.dtype)
        theirs = ledger.live
        student = student_of(teacher, shape.layout)
        student.newest = student.newest if shape.newest is None else list(shape.newest)
        stage = entry.make(teacher, student)
        with _without_moves():
            stage.prepare()
        trained, each = [parameter for _, parameter in stage.trained().values()], _moments(stage)
        for parameter in trained:
            parameter.requires_grad_(True)
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        sizes = {"teacher": theirs, "student": ledger.live - theirs}
        count = float(sum(4 * parameter.numel() for parameter in trained))
        sizes |= {"trained": count, "gradients": count, "moments": float(2 * sum(each))}
        held = [torch.zeros(size, dtype=torch.uint8) for size in each for _ in range(2)]
        for parameter in trained if accumulates else ():
            parameter.grad = torch.zeros_like(parameter)
        ledger.forget_peak()
        peaks = _passes(shape, stage, text_of(windows, seq_len), ledger)
        del held
    return sizes | peaks


def _moments(stage: Stage) -> list[int]:
    """The bytes of one moment of each trained parameter of a stage."""
    trained, optimizer = stage.trained(), stage.options.optimizer
    wide = moments.wide_names(stage.student, trained)
    return [moments.bytes_of(parameter.shape, optimizer, name in wide) for name, (_, parameter) in trained.items()]


@contextmanager
def _without_moves() -> Iterator[None]:
    """Inside the block, `Module.to` does nothing: peft calls it to move an adapter to its layer's device, and fake tensors
    cannot be moved."""
    convert, module_class = nn.Module.to, cast(Any, nn.Module)
    module_class.to = lambda module, *unused, **options: module
    try:
        yield
    finally:
        module_class.to = convert


def _passes(shape: Shape, stage: Stage, batch: Batch, ledger: Ledger) -> dict[str, float]:
    """The peak bytes of the forward and backward passes of all losses of a batch, and the bytes after the last one."""
    peaks: dict[str, float] = {"forward": 0, "backward": 0}
    draw = iter(stage.losses(batch))
    wide: AbstractContextManager = WideAsOnAGpu() if shape.gpu else nullcontext()
    with wide:
        while True:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.autocast):
                drawn = next(draw, None)
            peaks["forward"] = max(peaks["forward"], ledger.peak)
            if drawn is None:
                return peaks | {"end": ledger.live}
            ledger.forget_peak()
            run_backward(  # `backward` would disable the mode that recomputed layers need
                (drawn[1],), (torch.ones(()),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
            peaks["backward"] = max(peaks["backward"], ledger.peak)
            ledger.forget_peak()
