"""AdamW over the parameters that a stage trains, and the learning-rate schedules."""

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.moments import EIGHT_BIT
from distill.stages.stage import TrainingOptions
from distill.training.eight_bits import EightBitAdamW


def make_optimizer(
    trained: dict[str, tuple[str, nn.Parameter]],
    options: TrainingOptions,
    wide: Container[str] = (),
    factor: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW | EightBitAdamW:
    """Make AdamW with one parameter group for each combination of role, rate factor and weight decay.

    Weight decay applies only to matrices whose role is not `new`. Parameters that are divided over processes have their own
    groups, because fused AdamW cannot take both kinds in one group.

    Args:
        wide: names of parameters whose moments stay float32 with `adamw_8bit`. factor: the factor on a parameter's rate, by
            name.

    Raises:
        ValueError: the recipe gives rates by role and lacks one.
    """
    groups: dict[tuple[str, bool, bool, float], list[nn.Parameter]] = {}
    for name, (role, parameter) in sorted(trained.items()):
        decays = role != "new" and parameter.dim() >= 2
        groups.setdefault((role, decays, isinstance(parameter, DTensor), factor(name)), []).append(parameter)
    entries: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": options.rate(role) * scaled,
            "peak": options.rate(role) * scaled,
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (role, decays, _, scaled), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    on_gpu = all(parameter.is_cuda for group in entries for parameter in group["params"])
    if options.optimizer == EIGHT_BIT:
        ids = {id(parameter) for name, (_, parameter) in trained.items() if name in wide}
        return EightBitAdamW(entries, options.betas, ids, compiled=on_gpu and options.compile is not False)
    return torch.optim.AdamW(entries, betas=options.betas, fused=on_gpu)


def rate_factor(step: int, steps: int, options: TrainingOptions) -> float:
    """The factor on the peak rate at a step (the first is 0). It has no state, so resuming needs no scheduler."""
    warmup = round(options.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "cosine":
        progress = (step - warmup) / max(steps - warmup, 1)
        return options.final + (1 - options.final) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = round(options.decay * steps)
    left = steps - step  # 1 at the last step
    return 1.0 if left > decay else options.final + (1 - options.final) * left / (decay + 1)


def set_rates(optimizer: torch.optim.Optimizer | EightBitAdamW, factor: float) -> float:
    """Set each group's rate to its peak times a factor. Returns the largest rate."""
    for group in optimizer.param_groups:
        rate = group["peak"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return max(group["peak"] * factor for group in optimizer.param_groups)
