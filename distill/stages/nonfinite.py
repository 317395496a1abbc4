"""Where a number that is no number began: a forward pass again, with a hook on every module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Found(Exception):
    """Ends the forward pass at the first output that is not finite."""


@torch.no_grad()
def first_nonfinite(model: nn.Module, forward: Callable[[], object], layers: str) -> str | None:
    """The innermost module that gives the first output that is not finite, with its layer; None where all are finite.

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


def _finite(output: object) -> bool:
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    if isinstance(output, dict):
        output = output.values()
    return all(_finite(part) for part in output) if isinstance(output, list | tuple | type({}.values())) else True
