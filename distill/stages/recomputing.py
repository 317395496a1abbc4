"""Activation recomputation of decoder layers in the backward pass: of everything, or all but matrix products and attention.

Selective recomputation (arXiv 2205.05198, section 5) keeps results that are expensive to compute and small to store. Each
of the students' kernels is one autograd function and is recomputed as a whole.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from distill.compat import keep_layers, recompute_layers

Recomputed = bool | Literal["selective"]

aten = torch.ops.aten
PRODUCTS = frozenset({aten.mm.default, aten.addmm.default})
BATCHED = frozenset({aten.bmm.default, aten.baddbmm.default})
ATTENTION = "aten::_scaled_dot_product"  # prefix of the names of the fused attention kernels


def recompute(model: nn.Module, what: Recomputed) -> None:
    """Make every decoder layer recompute activations in the backward pass: all for True, none for False.

    "selective" recomputes all but what `policy` keeps."""
    if not what:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    recompute_layers(model, options)


def recompute_nothing(model: nn.Module, what: Recomputed) -> None:
    """The reverse of `recompute`."""
    if what:
        keep_layers(model)


def policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Keep the results of matrix products and of fused attention.

    The result of a batched product is kept only if it is not larger than its factors, as attention scores would be."""
    keep = op in PRODUCTS or (op in BATCHED and _no_larger(*arguments[-2:])) or str(op.name()).startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _no_larger(left: Tensor, right: Tensor) -> bool:
    """Whether a batched product has no more elements than its factors."""
    return left.shape[0] * left.shape[1] * right.shape[2] <= left.numel() + right.numel()
