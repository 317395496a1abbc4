"""Short causal depthwise convolution over time, as in Mamba blocks, with packed documents and a carried tail of inputs."""

from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.causal_conv.reference import causal_conv as reference_conv
from students.kernels.causal_conv.reference import conv_token as reference_token
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_conv,
    "triton": Deferred("students.kernels.causal_conv.kernel", "causal_conv"),
}
TOKENS: Implementations = {
    "reference": reference_token,
    "triton": Deferred("students.kernels.causal_conv.kernel", "conv_token"),
}
CHECKED = {"conv_token": TYPES, "causal_conv": TYPES, "causal_conv_step": TYPES}  # types compared with float64 on a GPU
TRITON_WIDTHS = (2, 3, 4)
ACTIVATIONS = (None, "silu")


def causal_conv(
    x: Float[Tensor, "b t c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None = None,
    activation: str | None = None,
    documents: Int[Tensor, "b t"] | None = None,
    initial: Float[Tensor, "b tail c"] | None = None,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b tail c"]]:
    """Compute y_t = act(bias + sum_i weight[:, w-1-i] x_{t-i}), over tokens of the same document.

    `initial` holds the w - 1 inputs before the first token and belongs to its document.

    Returns:
        y and the last w - 1 inputs; inputs of other documents than the last token's are zero.

    Raises:
        ValueError: an unknown activation, or an `initial` that does not hold w - 1 tokens.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {ACTIVATIONS}")
    if initial is not None and initial.shape[1] != weight.shape[1] - 1:
        raise ValueError(f"initial holds {initial.shape[1]} tokens, but a width of {weight.shape[1]} needs one fewer")
    refusal = f"a width of {weight.shape[1]} is none of {TRITON_WIDTHS}" if weight.shape[1] not in TRITON_WIDTHS else None
    op = "causal_conv" if x.shape[1] > 1 else "causal_conv_step"
    run = pick(op, IMPLEMENTATIONS, x, refusal, checked=CHECKED[op])
    return run(x, weight, bias, activation, documents, initial)


def conv_token(
    x: Float[Tensor, "b c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None,
    activation: str | None,
    ring: Float[Tensor, "b w c"],
    column: Int[Tensor, " 1"],
) -> Float[Tensor, "b c"]:
    """Compute one token of `causal_conv` and write its input to the ring, which holds the input of column i at place i % w.

    Raises:
        ValueError: an unknown activation, or a ring of another size than the filter.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {ACTIVATIONS}")
    if ring.shape[1] != weight.shape[1]:
        raise ValueError(f"a filter of width {weight.shape[1]} needs a ring of as many places, not {ring.shape[1]}")
    run = pick("conv_token", TOKENS, x, checked=CHECKED["conv_token"])
    return run(x, weight, bias, activation, ring, column)
