"""Linear layers in the hands of others: adapters, offloading, quantisation, parametrisations and hooks all stand around a
layer, and only calling it runs them.

A fused form that reads a layer's weight instead is right only where nothing stands there. `is_plain` asks that, and what
else is here reads a plain layer's weight and calls any other.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.compat import accelerate_hook, has_global_hooks
from students.kernels import is_on_paper
from students.shapes import Float

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of weights that are numbers as they stand
_NOTHING = nullcontext()


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether reading a layer's weight gives what calling it gives.

    Not so for a subclass (quantised, adapted, parametrised), a `forward` of its own (accelerate's hooks), any hook of the
    layer or of all modules, or a weight that is another kind of tensor, packed, or on the meta device (offloaded).
    """
    if type(layer) is not kind or not is_untouched(layer):
        return False
    own = layer.__dict__
    weight = own["_parameters"].get("weight", own.get("weight"))
    there = type(weight) in (nn.Parameter, Tensor) and not weight.is_meta
    return (there or is_on_paper()) and weight.dtype in TYPES


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's `forward` and nothing else: no hooks, and none of accelerate's."""
    own = module.__dict__  # read so, and not as attributes: this is asked several times a layer for every token
    if "forward" in own or "_hf_hook" in own or has_global_hooks():
        return False
    return not (own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"])


class Rows:
    """Some of a linear layer's outputs for one input: of a plain layer those alone, any other is called, once.

    Args:
        layer: the layer. x: its input [... in].
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.called = None if is_plain(layer) else layer(x)

    def __call__(self, start: int | None, stop: int | None) -> Tensor:
        """Outputs from `start` to before `stop`, counted as in a slice."""
        if self.called is not None:
            return self.called[..., start:stop]
        weight, bias = numbers(self.layer)
        return F.linear(self.x, weight[start:stop], None if bias is None else bias[start:stop])

    def wide(self, start: int | None, stop: int | None, bias: Tensor | None = None) -> Tensor:
        """These outputs and a further bias in float32 or wider, also under autocast: decays do not survive bfloat16 well."""
        with torch.autocast(self.x.device.type, enabled=False):
            if self.called is not None:
                return _added(self.called[..., start:stop], bias)
            weight, own = numbers(self.layer)
            return _widely(self.x, weight[start:stop], None if own is None else own[start:stop], bias)


def wide_linear(x: Tensor, layer: nn.Module, bias: Tensor | None = None) -> Tensor:
    """A linear layer, and a bias beside its own, in float32 or wider, also under autocast.

    What stands around the layer computes in the type that the layer has.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not is_plain(layer):
            return _added(layer(accepted(layer, x)), bias)
        return _widely(x, *numbers(layer), bias)


def taps(conv: nn.Module, x: Tensor) -> tuple[Float[Tensor, "c taps"], Float[Tensor, " c"] | None]:
    """The filters of a depthwise convolution without padding, and its bias.

    They are read off a plain one. Any other is called on an impulse and on zeros, which tells both of whatever is linear.
    `x` is what the convolution is to read.
    """
    if is_plain(conv, nn.Conv1d):
        weight, bias = numbers(conv)
        return weight.squeeze(1), bias
    weight = cast(Tensor, conv.weight)
    channels, width = weight.shape[0], weight.shape[-1]
    dtype = weight.dtype if weight.dtype in TYPES else torch.float32
    inputs = torch.zeros(2, channels, 2 * width - 1, dtype=dtype, device=x.device)
    inputs[0, :, width - 1] = 1
    with torch.autocast(x.device.type, enabled=False):
        impulse, constant = conv(inputs)
    return (impulse - constant).flip(-1), constant[:, 0]


def accepted(layer: nn.Module, x: Tensor) -> Tensor:
    """An input in the type of a layer's weight, where that is a type of numbers."""
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    return x.to(dtype) if dtype in TYPES else x


def loaded(modules: Iterable[nn.Module]) -> AbstractContextManager:
    """Inside the block, the parameters that accelerate has taken out of these modules themselves are in memory.

    For modules whose parts are used without calling the module.
    """
    hooked = [(module, hook) for module in modules if (hook := accelerate_hook(module)) is not None]
    return _loaded(hooked) if hooked else _NOTHING


@contextmanager
def _loaded(hooked: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooked:
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def numbers(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a plain layer."""
    return cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widely(x: Tensor, weight: Tensor, *biases: Tensor | None) -> Tensor:
    wide = _wide(weight.dtype)
    given = [bias.to(wide) for bias in biases if bias is not None]
    return F.linear(x.to(wide), weight.to(wide), reduce(torch.add, given) if given else None)


def _added(y: Tensor, bias: Tensor | None) -> Tensor:
    y = y.to(_wide(y.dtype))
    return y if bias is None else y + bias.to(y.dtype)
