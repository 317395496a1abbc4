"""`micro_batch: auto`: the most windows at a time that fit a device's memory, found before a stage's first step.

On a GPU by dry steps, forward and backward on real windows, beside room for AdamW's moments and a reserve; nothing of a run
changes by them. Where several processes share what trains, one that runs out would leave the others waiting; there, and on a
CPU, whose allocator says nothing before the machine stops, the footprint of the stage is held against what is free.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from distill.errors import UserError, reason_of
from distill.footprint import Footprint, Shape, footprint, most_windows
from distill.memory import available, capacity, ran_out
from distill.recipe import Recipe
from distill.runs import random_states
from distill.runs.run_dir import RunDir
from distill.stages import StageEntry
from distill.training.trainer import Trainer
from students.config import Layout

RESERVE = 0.07  # of a device's memory that is left free


def fit_micro_batch(trainer: Trainer, entry: StageEntry, recipe: Recipe, folder: RunDir | None, layout: Layout) -> str:
    """Set the trainer's micro-batch, for a recipe that says auto: what the run folder says of the same device and as many
    processes, else what is found now, which is then written there.

    Returns:
        what to say of it.

    Raises:
        UserError: not even one window at a time fits.
    """
    accelerator = trainer.accelerator
    place = {"device": device_name(accelerator.device), "processes": trainer.world}
    known = folder.read("run.json", {}).get("micro_batches", {}).get(entry.key) if folder else None
    accelerator.wait_for_everyone()  # all have read before one writes
    share = trainer.batch // trainer.world
    if known and {name: known[name] for name in place} == place and share % known["windows"] == 0:
        trainer.micro_batch = known["windows"]
        return f"micro_batch of {entry.name}: {trainer.micro_batch} windows at a time, as found before"
    dry = accelerator.device.type == "cuda" and not (trainer.world > 1 and entry.kind.whole_student)
    found = most_windows(share, fits_dry(trainer)) if dry else _estimated(trainer, entry, recipe, layout, share)
    found = int(accelerator.gather(torch.tensor([found], device=accelerator.device)).min())
    if found < 1:
        raise UserError(
            f"{recipe.name}: micro_batch of {entry.name} is auto, and not even one window of {trainer.windows.seq_len} "
            f"tokens at a time fits the memory of this {accelerator.device.type}; lower the length of its windows, or train "
            "less"
        )
    trainer.micro_batch = found
    if folder and accelerator.is_main_process:
        folder.change("run.json", lambda content: _noted(content, entry.key, {"windows": found, **place}))
    accelerator.wait_for_everyone()
    how = "found by dry steps" if dry else "by its footprint and the memory that is free"
    return f"micro_batch of {entry.name}: {found} windows at a time, {how}"


def fits_dry(trainer: Trainer) -> Callable[[int], bool]:
    """Whether so many windows at a time go forward and backward beside gradients, moments and the reserve."""

    def fits(count: int) -> bool:
        saved, held = random_states.random_tensors(), []
        try:
            held = _reserved(trainer)
            with trainer.stepping():
                for _ in range(2):  # gradients are there when the second one begins
                    _dry_step(trainer, count)
            return True
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return False
        finally:
            held.clear()
            for parameter in trainer.parameters.values():
                parameter.grad = None
            random_states.load_random(saved)
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    return fits


def _reserved(trainer: Trainer) -> list[Tensor]:
    """Memory held while a dry step runs: of moments that are not there yet, and the reserve."""
    device = trainer.accelerator.device
    moments = 0 if trainer.optimizer.state else sum(8 * parameter.numel() for parameter in trainer.parameters.values())
    reserve = int(RESERVE * capacity(device)) if device.type == "cuda" else 0
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in (moments, reserve) if size]


def _dry_step(trainer: Trainer, count: int) -> None:
    accelerator = trainer.accelerator
    batch = trainer.windows.batch(trainer.first, count).to(accelerator.device)
    draw = iter(trainer.stage.losses(batch))
    while True:
        with accelerator.autocast():
            drawn = next(draw, None)
        if drawn is None:
            return
        accelerator.backward(0.0 * drawn[1])
        del drawn


def _estimated(trainer: Trainer, entry: StageEntry, recipe: Recipe, layout, share: int) -> int:
    """The most windows whose footprint fits what is free; one where it cannot be worked out."""
    teacher, device = trainer.stage.teacher, trainer.accelerator.device
    shape = Shape.of(recipe, teacher.config, teacher.family, layout, device.type == "cuda")
    shape = replace(shape, newest=tuple(trainer.stage.student.newest))
    length = trainer.windows.seq_len
    try:
        one, two = (footprint(shape, entry, length, count) for count in (1, 2))
    except Exception as error:  # of every type: an operation that looks at values
        trainer.accelerator.print(f"  the memory of {entry.name} cannot be worked out ({reason_of(error)}); one at a time")
        return 1
    if trainer.optimizer.state:  # its moments are there already
        one = replace(one, moments=0.0)
    room = (1 - RESERVE) * available(device)
    return most_windows(share, lambda count: _beside(one, two, count, trainer.world) <= room)


def _beside(one: Footprint, two: Footprint, count: int, processes: int) -> float:
    """What is not there yet of a stage with so many windows at a time: activations, gradients and moments."""
    steady = (one.gradients + one.moments) / processes
    return steady + one.activations + (count - 1) * (two.activations - one.activations)


def device_name(device: torch.device) -> str:
    """What tells a device from one with other memory."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {capacity(device) / 2**30:.0f} GiB"


def _noted(content: dict, key: str, entry: dict) -> None:
    content["micro_batches"] = {**content.get("micro_batches", {}), key: entry}
