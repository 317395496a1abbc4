"""Keys and values that one layer's attention leaves for later layers'."""

import torch
from torch import Tensor

from students.shapes import Float, Int


class SharedKeys:
    """Keys and values on their way from one layer's attention to later layers', within one call.

    They travel as an object handed to both, so that each call has its own and a layer that is recomputed finds them.
    Only non-reentrant checkpointing can take gradients through it: the reentrant form runs the layers without a graph first,
    and knows of nothing that passes from one to the next but their arguments and results.
    """

    def __init__(self) -> None:
        self._graph = torch.is_grad_enabled()
        self._kept: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        self._parts: dict[int, SharedKeys] = {}

    def part(self, number: int) -> "SharedKeys":
        """Those of some rows alone, where rows go through the layers in parts."""
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
        """Leave them for the layers that follow.

        Raises:
            RuntimeError: under reentrant checkpointing.
        """
        self._check_graph()
        self._kept = (k, v, documents, positions)

    def read(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Take them.

        Raises:
            RuntimeError: no layer before has left any in this call, or reentrant checkpointing.
        """
        self._check_graph()
        if self._kept is None:
            raise RuntimeError("no earlier layer has left its keys and values in this call")
        return self._kept

    def _check_graph(self) -> None:
        """Refuse a layer that computes no graph within a call that does: its keys would be constants to the others."""
        if self._graph and not torch.is_grad_enabled():
            raise RuntimeError(
                "layers that share keys and values (share_kv) get wrong gradients from reentrant checkpointing; enable it "
                'with {"use_reentrant": False}'
            )

    def detach(self) -> None:
        """Cut them off from what they were computed by."""
        k, v, *rest = self.read()
        documents, positions = (None if part is None else part.detach() for part in rest)
        self._kept = k.detach(), v.detach(), documents, positions
