"""A search for the first module whose output is not finite, by a second forward pass with a hook on every module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHUNK = 1024  # tokens whose logits are checked at once


class _Found(Exception):
    """Ends the forward pass at the first output that is not finite."""


@torch.no_grad()
def first_nonfinite(model: nn.Module, forward: Callable[[], object], layers: str) -> str | None:
    """The name of the innermost module with the first output that is not finite, with its layer; None if all are finite.

    Args:
        forward: runs the model. layers: path of the model's list of layers.
    """
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, arguments: tuple, output: object) -> None:
        if not _finite(output):
            raise _Found(names[module])

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        forward()
    except _Found as found:
        name = str(found)
        inside = name.startswith(f"{layers}.")
        return f"layer {name.removeprefix(f'{layers}.').split('.')[0]} ({name})" if inside else name
    finally:
        for hook in hooks:
            hook.remove()
    return None


def told(whose: str, place: str, model: nn.Module) -> str:
    """A sentence that names the first output that is not finite and its cause: damaged weights, or overflow.

    Args:
        whose: "teacher" or "student". place: the result of `first_nonfinite`.
    """
    plain = ((name, tensor) for name, tensor in model.named_parameters() if type(tensor) is nn.Parameter)
    wrong = next((name for name, tensor in plain if not bool(tensor.isfinite().all())), None)
    if wrong is not None:
        cause = f"its weights are not finite, the first in {wrong}"
    else:
        held = {str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters() if tensor.is_floating_point()}
        dtype = " or ".join(sorted({*held, *(["bfloat16"] if torch.is_autocast_enabled() else [])}))
        cause = f"its weights are finite, so its activations overflow there: they exceed the range of {dtype}"
    return f"the {whose}'s first output that is not finite is that of {place}; {cause}"


def _finite(output: object) -> bool:
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    if isinstance(output, dict):
        output = output.values()
    return all(_finite(part) for part in output) if isinstance(output, list | tuple | type({}.values())) else True
