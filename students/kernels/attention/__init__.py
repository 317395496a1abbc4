"""Softmax attention within documents: full, or a sliding window that always sees each document's first tokens too.

The first tokens ("sinks", arXiv 2309.17453) carry much of the attention mass; a window without them falls apart.
"""

from torch import Tensor

from students.kernels import pick
from students.kernels.attention.reference import attention as reference_attention
from students.shapes import Float, Int

IMPLEMENTATIONS = {"reference": reference_attention}


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s h d"],
    v: Float[Tensor, "b s h p"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    documents: Int[Tensor, "b s"] | None = None,
    positions: Int[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b t h p"]:
    """Attend from the last t of s tokens to all s, causally.

    Args:
        scale: multiplies the logits. softcap: c in c tanh(logits / c), applied next.
        window: a token sees itself and the window - 1 tokens before it; None means all of them.
        sinks: it also sees the tokens of its document whose position is below this.
        documents: no token sees one of another id. positions: place in the document; needed where there are sinks.

    Raises:
        ValueError: a window below 1, or sinks without documents and positions.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens sees nothing; it must be at least 1")
    if window is not None and sinks and (documents is None or positions is None):
        raise ValueError(f"{sinks} sinks need each token's document and its position there")
    run = pick("attention", IMPLEMENTATIONS, q)
    return run(q, k, v, scale, softcap, window, sinks, documents, positions)
