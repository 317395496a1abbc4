"""The output states of some decoder layers, kept while a forward pass runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn


@contextmanager
def recorded(
    layers: Mapping[int, nn.Module], columns: Callable[[], Int[Tensor, "b t"] | None] = lambda: None
) -> Iterator[dict[int, Tensor]]:
    """The states [b t d] that each of these layers gives while the block runs, by the same numbers; to be read behind it.

    They stay in the graph. A layer that is recomputed in the backward pass gives them once, in the forward pass. The hooks
    compute nothing: they run inside what is recomputed, where the second time must save what the first did.

    Args:
        columns: where the text's tokens stand among others (meta tokens), asked while a layer runs.
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
