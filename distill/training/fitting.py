"""`micro_batch: auto`: a search for the largest micro-batch that fits a device's memory, before a stage's first step.

On a GPU, dry steps are tried: forward and backward on real windows, with room for AdamW's moments and a reserve. They change
nothing of the run. The stage's estimated footprint is compared with the free memory instead in two cases: where several
processes train the student together, because one that runs out of memory would leave the others waiting; and on a CPU, whose
allocator reports no error before the machine stops.
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

RESERVE = 0.07  # share of a device's memory that is left free


def fit_micro_batch(trainer: Trainer, entry: StageEntry, recipe: Recipe, folder: RunDir | None, layout: Layout) -> str:
    """Set the trainer's micro-batch for a recipe with `micro_batch: auto`.

    The value in the run folder for the same device and number of processes is used; else one is found and written there.

    Returns:
        a line for the log.

    Raises:
        UserError: not even one window fits.
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
            f"tokens fits the memory of this {accelerator.device.type}; lower seq_len, or train fewer parameters"
        )
    trainer.micro_batch = found
    if folder and accelerator.is_main_process:
        folder.change("run.json", lambda content: _noted(content, entry.key, {"windows": found, **place}))
    accelerator.wait_for_everyone()
    how = "found by dry steps" if dry else "by its footprint and the memory that is free"
    return f"micro_batch of {entry.name}: {found} windows at a time, {how}"


def fits_dry(trainer: Trainer) -> Callable[[int], bool]:
    """A test whether a number of windows at a time fits: forward and backward with gradients, moments and the reserve."""

    def fits(count: int) -> bool:
        saved, held = random_states.random_tensors(), []
        try:
            held = _reserved(trainer)
            with trainer.stepping():
                for _ in range(2):  # the second begins with gradients in memory
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
    """Allocate the memory that a dry step must leave free: for moments that do not exist yet, and the reserve."""
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
    """The most windows whose estimated footprint fits the free memory; 1 if there is no estimate."""
    teacher, device = trainer.stage.teacher, trainer.accelerator.device
    shape = Shape.of(recipe, teacher.config, teacher.family, layout, device.type == "cuda")
    shape = replace(shape, newest=tuple(trainer.stage.student.newest))
    length = trainer.windows.seq_len
    try:
        one, two = (footprint(shape, entry, length, count) for count in (1, 2))
    except Exception as error:  # errors of any type, such as an operation that needs values, which meta tensors lack
        trainer.accelerator.print(f"  the memory of {entry.name} cannot be estimated ({reason_of(error)}); micro_batch is 1")
        return 1
    if trainer.optimizer.state:  # its moments are there already
        one = replace(one, moments=0.0)
    room = (1 - RESERVE) * available(device)
    return most_windows(share, lambda count: _beside(one, two, count, trainer.world) <= room)


def _beside(one: Footprint, two: Footprint, count: int, processes: int) -> float:
    """The bytes that a step of `count` windows at a time adds: activations, gradients and moments."""
    steady = (one.gradients + one.moments) / processes
    return steady + one.activations + (count - 1) * (two.activations - one.activations)


def device_name(device: torch.device) -> str:
    """The name of a device with the size of its memory."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {capacity(device) / 2**30:.0f} GiB"


def _noted(content: dict, key: str, entry: dict) -> None:
    content["micro_batches"] = {**content.get("micro_batches", {}), key: entry}
