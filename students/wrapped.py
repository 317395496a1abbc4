"""Plain and wrapped linear layers: adapters, offloading, quantisation, parametrisations and hooks run only in a call.

Fused forms read a layer's weight without calling the layer, which is correct only for a plain layer. `is_plain` checks that.
The other functions here read the weight of a plain layer, and call any other layer.
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

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of weights that are not quantised
_NOTHING = nullcontext()


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a product with a layer's weight gives the same as a call of the layer.

    False for a subclass (quantised, adapted, parametrised), a replaced `forward` (accelerate's hooks), a hook on the layer
    or on all modules, and a weight that is of another tensor class, packed, or on the meta device (offloaded).
    """
    if type(layer) is not kind or not is_untouched(layer):
        return False
    own = layer.__dict__
    weight = own["_parameters"].get("weight", own.get("weight"))
    there = type(weight) in (nn.Parameter, Tensor) and not weight.is_meta
    return (there or is_on_paper()) and weight.dtype in TYPES


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's `forward` and nothing else: no hooks, and none of accelerate's."""
    own = module.__dict__  # faster than attributes: this runs several times a layer for every token
    if "forward" in own or "_hf_hook" in own or has_global_hooks():
        return False
    return not (own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"])


class Rows:
    """Slices of a linear layer's output for one input. A plain layer computes only the slice; any other is called once.

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
        """These outputs plus a further bias in float32 or wider, also under autocast: decays lose too much in bfloat16."""
        with torch.autocast(self.x.device.type, enabled=False):
            if self.called is not None:
                return _added(self.called[..., start:stop], bias)
            weight, own = numbers(self.layer)
            return _widely(self.x, weight[start:stop], None if own is None else own[start:stop], bias)


def wide_linear(x: Tensor, layer: nn.Module, bias: Tensor | None = None) -> Tensor:
    """A linear layer's output plus a further bias in float32 or wider, also under autocast.

    A layer that is not plain computes in its own type, and its output is widened.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not is_plain(layer):
            return _added(layer(accepted(layer, x)), bias)
        return _widely(x, *numbers(layer), bias)


def taps(conv: nn.Module, x: Tensor) -> tuple[Float[Tensor, "c taps"], Float[Tensor, " c"] | None]:
    """The filters of a depthwise convolution without padding, and its bias.

    A plain convolution's are read. Any other convolution is called on an impulse and on zeros, which gives both because it
    is linear. `x` is the convolution's later input, which gives the device.
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
    """An input cast to the type of a layer's weight, unless the weight is quantised."""
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    return x.to(dtype) if dtype in TYPES else x


def loaded(modules: Iterable[nn.Module]) -> AbstractContextManager:
    """Inside the block, parameters that accelerate has offloaded from these modules themselves are in memory.

    For modules whose parameters are used without a call of the module.
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
