"""What kept attention does with one token's q, k and v before it attends: norms, rotary embedding, and the keys' places."""

from typing import NamedTuple

from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.rotary_token.reference import rotary_token as reference_token
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_token,
    "triton": Deferred("students.kernels.rotary_token.kernel", "rotary_token"),
}
CHECKED = {"rotary_token": TYPES}  # types compared with float64 on a GPU


class Places(NamedTuple):
    """Where a token's key and value go: place `place` of what is kept."""

    keys: Float[Tensor, "b kv s p"]
    values: Float[Tensor, "b kv s p"]
    place: Int[Tensor, " 1"]


def rotary_token(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b kv p"],
    v: Float[Tensor, "b kv p"],
    tables: tuple[Float[Tensor, "rows 1 r"], Float[Tensor, "rows 1 r"]],
    places: Places,
    norms: tuple[Float[Tensor, " p"], Float[Tensor, " p"], float] | None = None,
) -> Float[Tensor, "b h 1 p"]:
    """The queries rotated; keys rotated and values into their places.

    Args:
        tables: cosines and sines; channel i turns with i + r / 2. norms: weights of RMSNorms over each head's q and k before
            that, and their epsilon.
    """
    run = pick("rotary_token", IMPLEMENTATIONS, places.keys, checked=CHECKED["rotary_token"])
    return run(q, k, v, tables, places, norms)
