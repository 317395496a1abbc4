"""The memory of fake tensors, counted as an allocator would: the bytes that are in use, and their peak."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from distill.compat import ATTENTION_CHOICE, NUMBER_READ, FakeTensor, TorchDispatchMode, storage_key, tree_leaves

BLOCK = 512  # PyTorch's allocator rounds up to multiples of this number of bytes
SLACK = 2**-11  # the peak may grow by this share before freed storages are searched, which takes time
aten = torch.ops.aten
READ = {  # operations that read a value, and what they return for a fake tensor
    NUMBER_READ: lambda tensor: tensor.dtype != torch.bool and 1,
    aten.is_nonzero.default: lambda tensor: False,
    aten.equal.default: lambda tensor: False,
    aten.nonzero.default: lambda tensor: tensor.new_zeros((1, tensor.dim()), dtype=torch.long),
}
FLASH, EFFICIENT = 1, 2  # of torch.nn.attention.SDPBackend
WIDEST_FLASH = 256  # channels of a head


class Ledger(TorchDispatchMode):
    """Counts every storage that an operation makes, until it is freed. Enter it outside a `FakeTensorMode`.

    Since a fake tensor has no values, a truth value read from it is False, a number is 1, and one of its places is nonzero.
    So texts of several documents are treated as such. Fused attention is chosen as on a GPU without cuDNN's attention:
    FlashAttention without a mask, else the memory-efficient kernel.
    """

    def __init__(self, gpu: bool = True) -> None:
        """gpu: choose fused attention as on a GPU."""
        super().__init__()
        self._gpu = gpu
        self._counted: dict[int, tuple[StorageWeakRef, int]] = {}  # by storage, since graphs hold storages without tensors
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
        """The bytes in use."""
        dead = [key for key, (storage, _) in self._counted.items() if storage.expired()]
        for key in dead:
            self._live -= self._counted.pop(key)[1]
        return self._live

    @property
    def peak(self) -> int:
        """The most bytes in use at once since the last `forget_peak`, too low by a share of SLACK at most."""
        return max(self._peak, self.live)

    def forget_peak(self) -> None:
        """Start a new peak at the bytes in use."""
        self._peak = self.live

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
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
