"""Retention (RetNet, arXiv 2307.08621): linear attention with a fixed decay for each head, which is not trained.

    y_i = sum_{j <= i} gamma^(i - j) (q_i . k_j) v_j        out = out_proj(weight rms_norm(y, each head) silu(gate_proj(h)))

q and k are rotated as in attention (RetNet's xPos is this rotation, with the decay as a separate factor). There are two
schedules of gamma:

  retnet     1 - 2^(-5 - x), with x from 0 to 7 evenly over the heads: equation 8 for 8 heads
  lightning  exp(-2^(-8 (i + 1) / heads)), i = 0, 1 ...: the released slopes of lightning attention (MiniMax-01 in
             transformers; TransNormerLLM, arXiv 2307.14995, prints another formula). The released models also multiply the
             slopes by 1 - layer / layers; that factor is left out here, because a mixer does not know its layer

The norm is over each head's channels and does not remove their mean, as in the authors' code; the paper says GroupNorm.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from students.kernels.ssd import ssd, ssd_step
from students.mixers.gated_heads import GatedHeads
from students.mixers.mixer import Context, Matrix, Shape
from students.mixers.projections import rotate
from students.mixers.recurrent import carried
from students.mixers.transfer import Transfer
from students.shapes import Float, Int

DECAYS = ("retnet", "lightning")


@dataclass(frozen=True)
class RetentionParts:
    """Inputs of the scan: B is k, C is q."""

    values: Float[Tensor, "b t h p"]
    B: Float[Tensor, "b t h n"]
    C: Float[Tensor, "b t h n"]
    log_a: Float[Tensor, "b t h"]
    documents: Int[Tensor, "b t"] | None


class Retention(GatedHeads):
    """Multi-scale retention with one head for each attention head.

    Raises:
        ValueError: an unknown decay, or `rope: true` for an attention without rotary embedding.
    """

    orientable = True
    float32 = frozenset({"log_decay"})
    log_decay: Tensor
    choices = {"decay": DECAYS}
    meanings = {
        "decay": "The fixed decays of the heads: RetNet's, or those of lightning attention.",
        "rope": "Rotate q and k by their positions. Default: as the teacher does.",
    }

    def __init__(self, shape: Shape, *, decay: str = "retnet", rope: bool | None = None) -> None:
        super().__init__(shape)
        if decay not in DECAYS:
            raise ValueError(f"decay is {decay!r}; it is one of {', '.join(DECAYS)}")
        if rope and shape.rope is None:
            raise ValueError("rope: true, but the model's attention has no rotary embedding to take it from")
        self.decay, self.rope = decay, None if rope is False else shape.rope
        self.register_buffer("log_decay", schedule(decay, self.n_heads))

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> RetentionParts:
        q, k, v = self.heads(h)
        if self.rope:
            q, k = (rotate(part, context.tables, self.rope) for part in (q, k))
        return RetentionParts(v, k, q, self.log_decay.expand(*h.shape[:2], -1), context.documents)

    def mix(self, parts: RetentionParts, context: Context) -> Float[Tensor, "b t h p"]:
        inputs = {"x": parts.values, "log_a": parts.log_a, "B": parts.B, "C": parts.C}
        return carried(ssd, ssd_step, inputs, parts.documents, context)

    def semiseparable(self, parts: RetentionParts) -> Matrix:
        return Matrix(parts.C, parts.B, parts.log_a, None)

    @torch.no_grad()
    def set_decays(self, k: Float[Tensor, "h p d"], transfer: Transfer) -> None:
        self.log_decay.copy_(schedule(self.decay, self.n_heads))
        transfer.set("log_decay", f"the fixed decays of {self.decay}")

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        self.log_decay.copy_(-math.log(2) / tokens)


def schedule(decay: str, heads: int) -> Float[Tensor, " h"]:
    """The logarithm of each head's decay."""
    index = torch.arange(heads, dtype=torch.float64)
    if decay == "lightning":
        return -(2 ** (-8 * (index + 1) / heads)).float()
    exponents = 5 + 7 * index / max(heads - 1, 1)
    return torch.log1p(-(2**-exponents)).float()
