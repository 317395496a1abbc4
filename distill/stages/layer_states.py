"""A recorder of the outputs of some decoder layers during a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn


@contextmanager
def recorded(
    layers: Mapping[int, nn.Module], columns: Callable[[], Int[Tensor, "b t"] | None] = lambda: None
) -> Iterator[dict[int, Tensor]]:
    """Record the output states [b t d] of these layers while the block runs, by layer number. Read them after the block.

    They stay in the autograd graph. A layer that is recomputed in the backward pass gives its states once, in the forward
    pass. The hooks compute nothing: they run inside the recomputed part, whose second run must save the same tensors as
    the first.

    Args:
        columns: returns the columns of the text's tokens where meta tokens are among them; called while a layer runs.
    """
    found: dict[int, Tensor] = {}
    places: dict[int, Tensor | None] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output
            places[layer] = columns()

        return hook

    hooks = [module.register_forward_hook(keep(layer)) for layer, module in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for layer, place in places.items():
        if place is not None:
            found[layer] = found[layer].gather(1, place[..., None].expand(-1, -1, found[layer].shape[2]))
