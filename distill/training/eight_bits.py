"""AdamW with 8-bit moments: torchao's AdamW8bit over this process's part of each parameter."""

import logging
from collections.abc import Collection
from contextlib import nullcontext
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill import moments
from distill.errors import reason_of

_log = logging.getLogger(__name__)


class EightBitAdamW:
    """AdamW with 8-bit moments and the part of torch.optim.AdamW's interface that the trainer uses.

    `state` has the moments by parameter; of a parameter that is divided over processes, those of the local rows. `defaults`
    is empty: the optimizer is not fused, and steps are counted on the host.

    Args:
        entries: groups of parameters with their rates. wide: ids of parameters whose moments stay float32. compiled: whether
            steps are compiled by torch.compile; if that fails, a warning says so once, and they are not.
    """

    def __init__(self, entries: list[dict], betas: tuple[float, float], wide: Collection[int], compiled: bool) -> None:
        from torchao.optim import AdamW8bit

        self.defaults: dict = {}
        parameters = [parameter for group in entries for parameter in group["params"]]
        held = {parameter: _held(parameter) for parameter in parameters}
        self._divided = {parameter: held[parameter] for parameter in parameters if isinstance(parameter, DTensor)}
        self._optimizer = AdamW8bit(
            [group | {"params": [held[parameter] for parameter in group["params"]]} for group in entries], betas=betas
        )
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for parameter in parameters:
            if held[parameter].numel():  # a process may have no rows of a small parameter
                state = moments.begun(held[parameter], parameter.shape, id(parameter) in wide)
                self.state[parameter] = self._optimizer.state[held[parameter]] = state
        self._compiled = compiled and all(_compiles(tensor.device) for tensor in held.values())

    @property
    def param_groups(self) -> list[dict]:
        """The parameter groups; each `lr` is a tensor, to be set with `fill_`."""
        return self._optimizer.param_groups

    def step(self) -> None:
        """Update the local part of every parameter that has a gradient."""
        for parameter, held in self._divided.items():
            gradient = cast(DTensor | None, parameter.grad)
            held.grad = gradient.to_local() if gradient is not None and held.numel() else None
        with nullcontext() if self._compiled else torch.compiler.set_stance("force_eager"):
            self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none)
        for parameter, held in self._divided.items():
            parameter.grad = held.grad = None


def _held(parameter: nn.Parameter) -> Tensor:
    """The local rows of a parameter, in the same memory."""
    return cast(DTensor, parameter.detach()).to_local() if isinstance(parameter, DTensor) else parameter


@cache
def _compiles(device: torch.device) -> bool:
    """Whether torch.compile works for an optimizer step on a device, tried on a dummy parameter.

    A failure in a real step would leave some parameters updated."""
    from torchao.optim import AdamW8bit

    tried = nn.Parameter(torch.zeros(moments.LEAST, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        AdamW8bit([tried]).step()
    except Exception as error:  # compilers and their launchers raise errors of any type
        _log.warning("torch.compile fails here (%s): steps of adamw_8bit are not compiled", reason_of(error))
        return False
    return True
