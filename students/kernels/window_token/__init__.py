"""One-token step of attention over a window that is kept in a ring: rotary embedding, writing the token, softmax, sinks.

The step writes only the token's own key and value. If one of the first tokens leaves the window, its key and value are
copied to its place among the sinks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.window_token.reference import attend, held_positions
from students.kernels.window_token.reference import window_token as reference_token
from students.shapes import Float, Int

__all__ = ["CHECKED", "Keys", "Norms", "attend", "held_positions", "window_token"]

IMPLEMENTATIONS: Implementations = {
    "reference": reference_token,
    "triton": Deferred("students.kernels.window_token.kernel", "window_token"),
}
CHECKED = {"window_token": TYPES}  # types compared with float64 on a GPU
MOST = 128 * 128  # most elements of a head's keys that one program holds


class Keys(NamedTuple):
    """The cached keys and values: column i is at place i % s of the ring, position i at place i of the sinks.

    The token of column i has the position i + offset in its document; positions of earlier documents are negative. A ring
    that wraps around has one place more than the window, so that the leaving token is still there when a new one is written.

    window: how many tokens a token sees, itself included; None: all that are kept.
    """

    k: Float[Tensor, "b s kv p"]
    v: Float[Tensor, "b s kv p"]
    offset: Int[Tensor, " b"]
    window: int | None
    sinks: tuple[Float[Tensor, "b sinks kv p"], Float[Tensor, "b sinks kv p"]] | None = None


class Norms(NamedTuple):
    """The norms of q and k before the rotary embedding; kind: see `Shape.qk_norm`."""

    q: Float[Tensor, "h p"]
    k: Float[Tensor, "kv p"]
    kind: str
    eps: float


def window_token(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b kv p"],
    v: Float[Tensor, "b kv p"],
    keys: Keys,
    column: Int[Tensor, " 1"],
    dtype: torch.dtype,
    *,
    scale: float,
    softcap: float | None = None,
    rope: tuple[Float[Tensor, "rows 1 r"], Float[Tensor, "rows 1 r"], str] | None = None,
    norms: Norms | None = None,
    factors: Float[Tensor, " h"] | None = None,
    reads: Sequence[int] | None = None,
    share: Float[Tensor, "b h"] | None = None,
) -> Float[Tensor, "b h p"]:
    """Compute one token's attention and write its key and value into the ring.

    Args:
        column: number of the token in the ring. dtype: type of the output. rope: cosines, sines and the kind (`Shape.rope`).
            factors: multiply each head's output. reads: head i reads key head reads[i] (default: i // (h / kv)). share: each
            head's output is multiplied by 2 sigmoid(-share); the state branch gets the rest (`ssm_token.Gate`).
    """
    heads, elements = (q.shape[1], k.shape[1]), keys.k.shape[1] * q.shape[2]
    refusal = None
    if elements > MOST:
        refusal = f"{keys.k.shape[1]} keys of {q.shape[2]} channels are more than the {MOST} elements that a program holds"
    elif norms is not None and norms.kind != "rms":
        refusal = f"its kernel has no norm {norms.kind!r}"
    elif reads is not None or heads[0] % heads[1]:
        refusal = "its kernel needs heads that share the key heads evenly"
    run = pick("window_token", IMPLEMENTATIONS, keys.k, refusal, checked=CHECKED["window_token"])
    return run(q, k, v, keys, column, dtype, scale, softcap, rope, norms, factors, reads, share)
