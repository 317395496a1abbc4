"""Keys and values that one layer's attention shares with later layers."""

import torch
from torch import Tensor

from students.shapes import Float, Int


class SharedKeys:
    """The keys and values that one layer's attention writes and later layers read, within one call of the model.

    The object is passed to all these layers. Each call has its own, and a layer that is recomputed finds it again. Gradient
    checkpointing must be non-reentrant: the reentrant form runs layers without a graph first, and passes gradients only
    through their arguments and results.
    """

    def __init__(self) -> None:
        self._graph = torch.is_grad_enabled()
        self._kept: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        self._parts: dict[int, SharedKeys] = {}

    def part(self, number: int) -> "SharedKeys":
        """The keys and values of one part of the rows, where rows go through the layers in parts (`students.padding`)."""
        if number not in self._parts:
            self._parts[number] = SharedKeys()
            self._parts[number]._graph = self._graph
        return self._parts[number]

    def write(
        self,
        k: Float[Tensor, "b s kv p"],
        v: Float[Tensor, "b s kv p"],
        documents: Int[Tensor, "b s"] | None,
        positions: Int[Tensor, "b s"] | None,
    ) -> None:
        """Store keys and values for later layers.

        Raises:
            RuntimeError: under reentrant checkpointing.
        """
        self._check_graph()
        self._kept = (k, v, documents, positions)

    def read(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The stored keys, values, documents and positions.

        Raises:
            RuntimeError: no earlier layer has stored any in this call, or under reentrant checkpointing.
        """
        self._check_graph()
        if self._kept is None:
            raise RuntimeError("no earlier layer has stored its keys and values in this call")
        return self._kept

    def _check_graph(self) -> None:
        """Refuse a layer without a graph in a call with one: its keys would be constants for the other layers."""
        if self._graph and not torch.is_grad_enabled():
            raise RuntimeError(
                "layers that share keys and values (share_kv) get wrong gradients from reentrant checkpointing; enable it "
                'with {"use_reentrant": False}'
            )

    def detach(self) -> None:
        """Detach keys and values from the graph."""
        k, v, *rest = self.read()
        documents, positions = (None if part is None else part.detach() for part in rest)
        self._kept = k.detach(), v.detach(), documents, positions
