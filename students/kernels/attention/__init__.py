"""Softmax attention within documents: full, or a sliding window that always sees each document's first tokens too.

The first tokens ("sinks", arXiv 2309.17453) carry much of the attention mass; a window without them falls apart.
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
WIDEST = 256  # head that the Triton kernel serves
MOST_SINKS = 256  # it unrolls their tiles
MOST_ROWS = 128  # queries of a key head that one program of `attend_places` holds


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
    """Attend from the last t of s tokens to all s, causally; h / kv neighbouring heads read the same keys, values likewise.

    Full attention without documents runs on PyTorch's own kernels whatever the back end; one query without a gradient as in
    `attend_places`.

    Args:
        scale: multiplies the logits. softcap: c in c tanh(logits / c), applied next.
        window: a token sees itself and the window - 1 tokens before it; None means all of them.
        sinks: it also sees the tokens of its document whose position is below this.
        documents: no token sees one of another id; where s is t, an id is one run of tokens.
        positions: place in the document, counted from 0; needed where there are sinks.

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
        raise ValueError(f"{q.shape[2]} heads cannot share {k.shape[2]} key heads, {v.shape[2]} of values, evenly")
    if k.shape[2] != v.shape[2]:  # values of a mixer's identity, one a head
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
    """Attend from the newest t tokens of a text to keys and values in s places: column c of the text stands at c % s.

    Where s is as large as the text, a place is a column; where it is smaller, the places are a ring, over which a window
    turns, with t - 1 places more than the window has. What `last` says has not been written is not read. h / kv neighbouring
    heads read the same keys, values likewise. A row that sees nothing gives zeros. Softmax heeds no order: places that are
    all seen may stand in any.

    Args:
        scale: multiplies the logits. softcap: c in c tanh(logits / c), applied next.
        last: the newest token's column, read where the work is done: a captured graph goes on as it grows. None: s - 1.
        window: a token sees itself and the window - 1 columns before it; None means all that there are.
        start: the first column that a row sees. mask: the places that a row sees, others than 0; with `document`, those
            where the mask has that number.
        new: the newest tokens' keys and values, where they do not yet stand in their places: it writes them there.

    Raises:
        ValueError: more queries than places, heads that key heads do not divide, or a document without a mask.
    """
    time, heads = q.shape[1:3]
    places, kv = k.shape[1:3]
    if not 0 < time <= places:
        raise ValueError(f"{time} queries cannot be the newest of {places} keys")
    if heads % kv or v.shape[2] != kv:
        raise ValueError(f"{heads} heads cannot share {kv} key heads, {v.shape[2]} of values, evenly")
    if document is not None and mask is None:
        raise ValueError("a document is looked for in a mask, and there is none")
    kind = compute_type(q)
    refusal = "the kernel of tokens that come one by one has no gradient" if _wants_gradient(q, k, v, *(new or ())) else None
    if time * heads // kv > MOST_ROWS:
        refusal = f"{time} queries of {heads // kv} heads a key head are more than {MOST_ROWS}"
    refusal = refusal or _refusal(q, v, None, 0)
    run = pick("attention_places", PLACES, q, refusal, kind, CHECKED["attention_places"])
    return run(q.to(kind), k, v, scale, softcap, last, window, start, mask, document, new)


def _attend_latest(q, k, v, scale, softcap, window, sinks, documents, positions) -> Tensor:
    """One query, to the keys before it in order."""
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
    """Why the Triton kernel cannot serve these."""
    width = max(q.shape[3], v.shape[3])
    if width > WIDEST:
        return f"heads of {width} channels are wider than {WIDEST}"
    if window is not None and sinks > MOST_SINKS:
        return f"{sinks} sinks are more than {MOST_SINKS}"
    return None
