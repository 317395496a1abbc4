"""The GPU's autocast rules for CPU tensors.

The CPU's autocast has the same list of 16-bit operations as the GPU's, but a shorter list of float32 operations. This
module adds the missing ones.
Source: docs/source/amp.rst of PyTorch 2.11 to 2.13, "CUDA Ops that can autocast to float32".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distill.compat import tree_map_only

WIDE = frozenset(
    (
        "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits",
        "cdist", "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist",
        "erfinv", "exp", "expm1", "group_norm", "hinge_embedding_loss", "kl_div", "l1_loss", "layer_norm", "log",
        "log10", "log1p", "log2", "log_softmax", "logsumexp", "margin_ranking_loss", "mse_loss", "multi_margin_loss",
        "multilabel_margin_loss", "nll_loss", "norm", "normalize", "pdist", "poisson_nll_loss", "pow", "prod",
        "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softmax", "softmin",
        "softplus", "sum", "tan", "triplet_margin_loss",
    )
)  # fmt: skip


class WideAsOnAGpu(TorchFunctionMode):
    """Inside the block, while the CPU's autocast is on, the operations in WIDE get 16-bit inputs as float32."""

    def __torch_function__(self, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        keywords = keywords or {}
        if getattr(function, "__name__", "") in WIDE and torch.is_autocast_enabled("cpu"):
            arguments, keywords = tree_map_only(Tensor, _widened, (arguments, keywords))
        return function(*arguments, **keywords)


def _widened(tensor: Tensor) -> Any:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
