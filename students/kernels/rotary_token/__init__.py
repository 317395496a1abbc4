"""One-token norms and rotary embedding of q and k in kept attention; the key and the value are written into the cache."""

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
    """The cached keys and values, and the place where the token's key and value are written."""

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
    """Rotate one token's queries and keys and write keys and values into their place; returns the queries.

    Args:
        tables: cosines and sines; channel i is paired with i + r / 2. norms: weights of the RMSNorms over each head's q and
            k, applied before the rotation, and their epsilon.
    """
    run = pick("rotary_token", IMPLEMENTATIONS, places.keys, checked=CHECKED["rotary_token"])
    return run(q, k, v, tables, places, norms)
