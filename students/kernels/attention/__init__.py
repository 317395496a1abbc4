"""Softmax attention within documents: full, or over a sliding window and the first tokens of each document (sinks).

Sinks (arXiv 2309.17453) carry much of the attention mass; without them a window model's predictions collapse.
"""

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, compute_type, pick
from students.kernels.attention.reference import attend_places as reference_places
from students.kernels.attention.reference import attention as reference_attention
from students.kernels.attention.reference import visible_to
from students.shapes import Bool, Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_attention,
    "triton": Deferred("students.kernels.attention.kernel", "attention"),
}
PLACES: Implementations = {
    "reference": reference_places,
    "triton": Deferred("students.kernels.attention.decode", "attend_places"),
}
CHECKED = {"attention": TYPES, "attention_places": TYPES}  # compared with float64 on a GPU
WIDEST = 256  # most channels of a head in the Triton kernel
MOST_SINKS = 256  # most sinks in the Triton kernel, which unrolls the loop over their tiles
MOST_ROWS = 128  # most queries per key head that one program of `attend_places` holds


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv_p p"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    documents: Int[Tensor, "b s"] | None = None,
    positions: Int[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b t h p"]:
    """Compute causal attention from the last t of s tokens to all s tokens.

    h / kv neighbouring heads read the same keys, and likewise values. Full attention without documents runs on PyTorch's own
    kernels with every back end. One query without a gradient runs as in `attend_places`.

    Args:
        scale: multiplies the logits. softcap: c in c tanh(logits / c), applied after the scale.
        window: a token sees itself and the window - 1 tokens before it; None means all of them.
        sinks: a token also sees the tokens of its document whose position is below this.
        documents: no token sees a token with another id; if s equals t, the tokens of an id must be neighbours.
        positions: position of each token in its document, from 0; needed with sinks.

    Raises:
        ValueError: a window below 1, sinks without documents and positions, more queries than keys, or heads that key
            heads do not divide.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens sees nothing; it must be at least 1")
    if window is not None and sinks and (documents is None or positions is None):
        raise ValueError(f"{sinks} sinks need each token's document and its position there")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries cannot be the last of {k.shape[1]} keys")
    if q.shape[2] % k.shape[2] or q.shape[2] % v.shape[2]:
        raise ValueError(f"{q.shape[2]} heads cannot share {k.shape[2]} key heads and {v.shape[2]} value heads evenly")
    if k.shape[2] != v.shape[2]:  # the values are one identity matrix per head, to read off a mixer's matrix
        k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
    options = scale, softcap, window, sinks, documents, positions
    plain = window is None and documents is None and softcap is None and q.shape[1] == k.shape[1]
    if not plain and q.shape[1] == 1 and not _wants_gradient(q, k, v):
        return _attend_latest(q, k, v, *options)
    if plain or q.shape[1] == 1:
        return reference_attention(q, k, v, *options)
    kind = compute_type(q)
    run = pick("attention", IMPLEMENTATIONS, q, _refusal(q, v, window, sinks), kind, CHECKED["attention"])
    return run(q, k, v, *options) if run is reference_attention else run(q.to(kind), k.to(kind), v.to(kind), *options)


def attend_places(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv p"],
    *,
    scale: float,
    softcap: float | None = None,
    last: Int[Tensor, " 1"] | None = None,
    window: int | None = None,
    start: Int[Tensor, " b"] | None = None,
    mask: Bool[Tensor, "b s"] | Int[Tensor, "b s"] | None = None,
    document: Int[Tensor, " b"] | None = None,
    new: tuple[Float[Tensor, "b t kv d"], Float[Tensor, "b t kv p"]] | None = None,
) -> Float[Tensor, "b t h p"]:
    """Compute attention of the newest t tokens over a cache of s places; column c of the sequence is at place c % s.

    If s is at least the length of the sequence, places are columns. Otherwise the places are a ring for a window; the ring
    has t - 1 places more than the window. Places that were not written yet, according to `last`, are not read. h / kv
    neighbouring heads read the same keys and values. A query that sees no key returns zeros. For one query without `last`,
    `window` and `start`, the order of the places does not matter.

    Args:
        scale: multiplies the logits. softcap: c in c tanh(logits / c), applied after the scale.
        last: column of the newest token (None: s - 1). It is read on the device, so that a captured CUDA graph follows it.
        window: a token sees itself and the window - 1 columns before it; None means all of them.
        start: the first column that a sequence sees. mask: a sequence sees the places where its mask is not 0; with
            `document`, those where its mask equals that number.
        new: keys and values of the newest tokens, which are first written into their places; None if they are there.

    Raises:
        ValueError: more queries than places, heads that key heads do not divide, or a document without a mask.
    """
    time, heads = q.shape[1:3]
    places, kv = k.shape[1:3]
    if not 0 < time <= places:
        raise ValueError(f"{time} queries cannot be the newest of {places} keys")
    if heads % kv or v.shape[2] != kv:
        raise ValueError(f"{heads} heads cannot share {kv} key heads and {v.shape[2]} value heads evenly")
    if document is not None and mask is None:
        raise ValueError("document needs a mask with document ids, but mask is None")
    kind = compute_type(q)
    refusal = "the decoding kernel has no gradient" if _wants_gradient(q, k, v, *(new or ())) else None
    if time * heads // kv > MOST_ROWS:
        refusal = f"{time} queries of {heads // kv} heads per key head are more than {MOST_ROWS} rows"
    refusal = refusal or _refusal(q, v, None, 0)
    run = pick("attention_places", PLACES, q, refusal, kind, CHECKED["attention_places"])
    return run(q.to(kind), k, v, scale, softcap, last, window, start, mask, document, new)


def _attend_latest(q, k, v, scale, softcap, window, sinks, documents, positions) -> Tensor:
    """Compute attention of one query, the newest token, over keys in order."""
    documents = None if documents is None else documents.expand(len(q), -1)
    if window is not None and sinks:
        rows = torch.arange(k.shape[1], device=q.device)
        visible = visible_to(rows[-1:], rows, window, documents, positions, sinks)
        return attend_places(q, k, v, scale=scale, softcap=softcap, mask=visible[:, 0])
    document = None if documents is None else documents[:, -1]
    return attend_places(q, k, v, scale=scale, softcap=softcap, window=window, mask=documents, document=document)


def _wants_gradient(*parts: Tensor) -> bool:
    return torch.is_grad_enabled() and any(part.requires_grad for part in parts)


def _refusal(q: Tensor, v: Tensor, window: int | None, sinks: int) -> str | None:
    """Returns why the Triton kernel cannot serve these arguments; None if it can."""
    width = max(q.shape[3], v.shape[3])
    if width > WIDEST:
        return f"heads of {width} channels are wider than {WIDEST}"
    if window is not None and sinks > MOST_SINKS:
        return f"{sinks} sinks are more than {MOST_SINKS}"
    return None
