"""Gated RMSNorm of Mamba-2, applied to the scan's output before the output projection."""

from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.gated_norm.reference import gated_norm as reference_norm
from students.shapes import Float

IMPLEMENTATIONS: Implementations = {
    "reference": reference_norm,
    "triton": Deferred("students.kernels.gated_norm.kernel", "gated_norm"),
}
CHECKED = {"gated_norm": TYPES}  # types compared with float64 on a GPU
WIDEST = 16_384  # most channels of a group that one program of the Triton kernel holds


def gated_norm(
    y: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], weight: Float[Tensor, " c"], groups: int, eps: float
) -> Float[Tensor, "b t c"]:
    """Compute weight * g / sqrt(mean g^2 + eps) with g = y silu(z); the mean is over each of `groups` blocks of channels.

    Sources: Mamba-2, arXiv 2405.21060, section 7.2; RMSNorm, arXiv 1910.07467. Sums are float32 or wider.

    Returns:
        the output, in the type of y.

    Raises:
        ValueError: the channels are not a multiple of the groups.
    """
    if y.shape[-1] % groups:
        raise ValueError(f"{y.shape[-1]} channels cannot be cut into {groups} equal groups")
    width = y.shape[-1] // groups
    refusal = f"a group of {width} channels is wider than {WIDEST}" if width > WIDEST else None
    run = pick("gated_norm", IMPLEMENTATIONS, y, refusal, checked=CHECKED["gated_norm"])
    return run(y, z, weight, groups, eps)
