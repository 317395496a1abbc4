"""Attention within packed documents by our own kernel, for teachers and kept attention layers while a stage trains.

For packed documents transformers makes a mask of [b, 1, t, t]. FlashAttention does not support such a mask: PyTorch falls
back to a kernel that is several times slower, and the mask takes memory. The masks of this module are document numbers,
[b, t], which `students.kernels.attention` reads. Layers get them as arguments, so recomputed activations see the same masks.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from distill.compat import add_packed_attention
from students.kernels.attention import attention
from teachers.compat import attention_function, attention_implementation, attention_replaced
from teachers.teacher import Teacher

PACKED = "distill_packed_"  # + the attention implementation that is used for everything else
# Arguments that add nothing to the documents, the window and the softcap.
IDLE = frozenset(
    (
        "cache_position",
        "document_ids",
        "is_causal",
        "position_embeddings",
        "position_ids",
        "shared_keys",
        "unpadded",
        "use_cache",
    )
)
FIRST, BEYOND = 32, 64  # tokens of the trial's first document, and of its second one beyond the widest window
WIDEST = 8192  # the widest window that is tried
TOLERANCE = 0.1  # relative to a layer's output: bfloat16 causes 0.02, a look into another document more than 0.1

_log = logging.getLogger(__name__)
_served: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Unserved(RuntimeError):
    """The model's attention uses a feature that the packed attention does not support."""


@contextmanager
def packed_attention(*configs: PretrainedConfig) -> Iterator[None]:
    """Inside the block, the models of these transformers configs use our kernel for packed documents."""
    with ExitStack() as stack:
        for config in configs:
            original = attention_implementation(config)
            if original is not None and not original.startswith(PACKED):
                stack.enter_context(attention_replaced(config, _packed(original)))
        yield


def serves(teacher: Teacher) -> bool:
    """Whether the packed attention gives the same outputs as a teacher's own; tried once for each model on a short text."""
    model = teacher.model
    if model not in _served:
        _served[model] = teacher.family.recorded and _same(teacher)
    return _served[model]


@torch.no_grad()
def _same(teacher: Teacher) -> bool:
    """Compare the model's own attention with ours on two documents; the second is longer than every window."""
    windows = [teacher.logit_rules(layer).window or 0 for layer in range(teacher.n_layers)]
    room = teacher.positions()
    second = min(BEYOND + min(max(windows), WIDEST), WIDEST if room is None else room)
    ids = torch.arange(FIRST + second, device=teacher.device)[None] * 7 % teacher.config.vocab_size
    positions = torch.cat([torch.arange(length, device=teacher.device) for length in (FIRST, second)])[None]
    layers = range(teacher.n_layers)
    wanted = [seen.output.float() for seen in teacher.observe(ids, positions, layers)]
    try:
        with packed_attention(teacher.config):
            found = [seen.output.float() for seen in teacher.observe(ids, positions, layers)]
    except (Unserved, TypeError) as error:
        _log.info("%s keeps its own attention while stages train: %s", teacher.reference, error)
        return False
    places = slice(FIRST, 2 * FIRST), slice(-FIRST, None)  # where the other document was seen, and where windows end
    pairs = [(own[:, place], ours[:, place]) for own, ours in zip(wanted, found, strict=True) for place in places]
    away = max(((ours - own).norm() / own.norm()).item() for own, ours in pairs)
    if not away < TOLERANCE:
        _log.info(
            "%s keeps its own attention while stages train: the packed attention differs by %.2g", teacher.reference, away
        )
    return away < TOLERANCE


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    **unused: Any,
) -> Int[Tensor, "b t"]:
    """The mask function for transformers: the document numbers of packed rows, from 0. A document begins at a token that
    does not see the token before it.

    Raises:
        Unserved: there is a cache or padding.
    """
    if q_length != kv_length or attention_mask is not None:
        raise Unserved("the packed attention supports only whole rows without padding")
    row = torch.arange(batch_size, device=device)[:, None]
    place = torch.arange(1, q_length, device=device)[None]
    sees = torch.as_tensor(mask_function(row, 0, place, place - 1), device=device)
    documents = torch.zeros(batch_size, q_length, dtype=torch.long, device=device)
    documents[:, 1:] = (~sees.expand(batch_size, q_length - 1)).cumsum(1)
    return documents


def _packed(original: str) -> str:
    """Register an attention that stays within documents, and calls the original for any other mask; returns its name."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **rest,
    ) -> tuple[Tensor, Tensor | None]:
        told = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        if attention_mask is None or attention_mask.dim() != 2:
            given = {name: value for name, value in told.items() if value is not None}
            return attention_function(original, module)(module, query, key, value, attention_mask, **given, **rest)
        if unknown := [name for name, value in rest.items() if name not in IDLE and value is not None]:
            raise Unserved(f"the packed attention does not support {', '.join(unknown)}")
        if dropout:
            raise Unserved("the packed attention does not support dropout")
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(q, k, v, scale=scale, softcap=softcap, window=sliding_window, documents=attention_mask), None

    add_packed_attention(PACKED + original, torch.compiler.disable(attend), document_mask)
    return PACKED + original
