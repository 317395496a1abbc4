"""AdamW with moments of 8 bits: torchao's AdamW8bit over what this process holds of each parameter."""

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
    """As torch.optim.AdamW, as far as a trainer asks. `state` has the moments by parameter; of one that processes divide,
    those of the rows that are here. `defaults` is empty: it is not fused, and steps are counted on the host.

    Args:
        entries: groups of parameters with their rates. wide: parameters whose moments stay float32, by their ids. compiled:
            whether its steps are compiled by torch.compile; where that fails they are not, which is said once.
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
            if held[parameter].numel():  # of few rows some processes have none
                state = moments.begun(held[parameter], parameter.shape, id(parameter) in wide)
                self.state[parameter] = self._optimizer.state[held[parameter]] = state
        self._compiled = compiled and all(_compiles(tensor.device) for tensor in held.values())

    @property
    def param_groups(self) -> list[dict]:
        """Its groups; each rate is a tensor, to be filled."""
        return self._optimizer.param_groups

    def step(self) -> None:
        """Update what is here of every parameter that has a gradient."""
        for parameter, held in self._divided.items():
            gradient = cast(DTensor | None, parameter.grad)
            held.grad = gradient.to_local() if gradient is not None and held.numel() else None
        with nullcontext() if self._compiled else torch.compiler.set_stance("force_eager"):
            self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none)
        for parameter, held in self._divided.items():
            parameter.grad = held.grad = None


def _held(parameter: nn.Parameter) -> Tensor:
    """The rows of a parameter that are here, in the same memory."""
    return cast(DTensor, parameter.detach()).to_local() if isinstance(parameter, DTensor) else parameter


@cache
def _compiles(device: torch.device) -> bool:
    """Whether torch.compile can make an optimizer's step for a device; a failed step would have changed some parameters."""
    from torchao.optim import AdamW8bit

    tried = nn.Parameter(torch.zeros(moments.LEAST, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        AdamW8bit([tried]).step()
    except Exception as error:  # of every type: compilers and their launchers raise what they like
        _log.warning("torch.compile fails here (%s): steps of adamw_8bit are not compiled", reason_of(error))
        return False
    return True
