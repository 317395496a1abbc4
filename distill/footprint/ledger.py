"""The memory of tensors without values, kept as an allocator would keep it: what lives now, and the most that ever did."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from distill.compat import ATTENTION_CHOICE, NUMBER_READ, FakeTensor, TorchDispatchMode, storage_key, tree_leaves

BLOCK = 512  # bytes that PyTorch's allocator rounds up to
SLACK = 2**-11  # share of the most by which it may grow before what died is looked for: that costs time
aten = torch.ops.aten
READ = {  # of a tensor without values
    NUMBER_READ: lambda tensor: tensor.dtype != torch.bool and 1,
    aten.is_nonzero.default: lambda tensor: False,
    aten.equal.default: lambda tensor: False,
    aten.nonzero.default: lambda tensor: tensor.new_zeros((1, tensor.dim()), dtype=torch.long),
}
FLASH, EFFICIENT = 1, 2  # of torch.nn.attention.SDPBackend
WIDEST_FLASH = 256  # channels of a head


class Ledger(TorchDispatchMode):
    """Counts every storage that an operation makes, until it is freed. Stands outside a `FakeTensorMode`.

    Where there are no values, a truth value that is read from a tensor is false, and a number is 1; one place is not zero.
    So texts of several documents look like what they are. Fused attention is chosen as on a GPU without cuDNN's:
    FlashAttention where there is no mask, else the memory-efficient kernel.
    """

    def __init__(self, gpu: bool = True) -> None:
        """gpu: whether fused attention is a GPU's."""
        super().__init__()
        self._gpu = gpu
        self._counted: dict[int, tuple[StorageWeakRef, int]] = {}  # by the storage, which graphs may hold without Python
        self._live = self._peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        keywords = keywords or {}
        if op in READ and isinstance(arguments[0], FakeTensor):
            return READ[op](arguments[0])
        if op is ATTENTION_CHOICE:
            return _attention(*arguments, **keywords) if self._gpu else FLASH
        found = op(*arguments, **keywords)
        for part in tree_leaves(found):
            if isinstance(part, Tensor):
                self.count(part)
        return found

    @property
    def live(self) -> int:
        """Bytes of what lives now."""
        dead = [key for key, (storage, _) in self._counted.items() if storage.expired()]
        for key in dead:
            self._live -= self._counted.pop(key)[1]
        return self._live

    @property
    def peak(self) -> int:
        """The most bytes that lived at once, since `forget_peak` was last called; a share of SLACK less at most."""
        return max(self._peak, self.live)

    def forget_peak(self) -> None:
        """Take the most from now on."""
        self._peak = self.live

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self._counted and not self._counted[key][0].expired():
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._counted[key] = StorageWeakRef(storage), size
        self._live += size
        if self._live > self._peak * (1 + SLACK):
            self._peak = max(self._peak, self.live)


def _attention(query: Tensor, key: Any, value: Tensor, mask: Tensor | None = None, *unused: Any, **keywords: Any) -> int:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return FLASH if mask is None and half and query.shape[-1] <= WIDEST_FLASH else EFFICIENT
