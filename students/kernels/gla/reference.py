"""Gated linear attention in PyTorch: chunked, one token, and a float64 oracle for tests.

Let G_i be the vector of log decays from the start of a chunk through token i. Token i reads token j of its chunk with the
weight sum_n q_in k_jn exp(G_in - G_jn). As a product of q exp(G) and k exp(-G), this overflows under strong decays. So a
chunk is divided into pieces (arXiv 2312.06635, section 4.3): between two pieces, both exponents are relative to the start of
the later piece; within a piece, the difference is computed before exp. No exponent is above 0.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from students.kernels.chunks import Chunks, chunks_of, cut, join
from students.kernels.ssd.reference import accumulator
from students.shapes import Float, Int

CHUNK = 64
PIECE = 16


def gla(
    q: Float[Tensor, "b t h n"],
    k: Float[Tensor, "b t h n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h n"],
    documents: Int[Tensor, "b t"] | None,
    initial_state: Float[Tensor, "b h p n"] | None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.gla.gla`. Python loops over chunks, not over tokens."""
    dtype = accumulator(v)
    state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    chunks = chunks_of(documents, v, CHUNK)
    with torch.autocast(v.device.type, enabled=False):
        q, k, values, log_a = (cut(part, CHUNK, dtype) for part in (q, k, v, log_a))
        y, state = _chunked(q, k, values, log_a, chunks, state)
    return join(y, v.shape[1]).to(v.dtype), state


def gla_step(
    q: Float[Tensor, "b h n"],
    k: Float[Tensor, "b h n"],
    v: Float[Tensor, "b h p"],
    log_a: Float[Tensor, "b h n"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.gla.gla_step`."""
    dtype = state.dtype
    with torch.autocast(v.device.type, enabled=False):
        state = log_a.to(dtype).exp()[:, :, None] * state + v.to(dtype)[..., None] * k.to(dtype)[:, :, None]
        y = (state @ q.to(dtype)[..., None]).squeeze(-1)
    return y.to(v.dtype), state


def gla_recurrence(
    q: Float[Tensor, "b t h n"],
    k: Float[Tensor, "b t h n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h n"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Compute the definition token by token in float64: a slow oracle for tests."""
    q, k, v, a = q.double(), k.double(), v.double(), log_a.double().exp()
    state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    if initial_state is not None:
        state = initial_state.double()
    outputs = []
    for t in range(v.shape[1]):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1]).double()[:, None, None, None]
        state = torch.einsum("bhpn,bhn->bhpn", state, a[:, t]) + torch.einsum("bhp,bhn->bhpn", v[:, t], k[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, t]))
    return torch.stack(outputs, 1), state


def _chunked(q, k, v, log_a, chunks: Chunks, state):
    """Scan tensors of shape [b h z l .]: z chunks of l tokens."""
    total = log_a.cumsum(3)  # G
    last = total[:, :, :, -1]
    from_start = total.masked_fill(~chunks.entered[..., None], -torch.inf).exp()
    to_end = (last[:, :, :, None] - total).masked_fill(~chunks.leaving[..., None], -torch.inf).exp()
    kept = last.masked_fill(~chunks.through[..., None], -torch.inf).exp()
    added = v.transpose(3, 4) @ (k * to_end)  # [b h z p n]
    states = []
    for z in range(k.shape[2]):
        states.append(state)
        state = kept[:, :, z, None] * state + added[:, :, z]
    square = checkpoint(_square, q, k, log_a, total, use_reentrant=False, preserve_rng_state=False)
    y = square.masked_fill(~chunks.pairs, 0.0) @ v + (q * from_start) @ torch.stack(states, 2).transpose(3, 4)
    return y, state


def _square(q, k, log_a, total):
    """Compute the weight of every token on the earlier tokens of its chunk, [b h z l l].

    Values above the diagonal are invalid. The intermediate results hold PIECE numbers per token and channel. They are
    recomputed in the backward pass, not kept.
    """
    start = (total - log_a).unflatten(3, (-1, PIECE))[:, :, :, :, :1]  # G before each piece, [b h z s 1 n]
    pieces = CHUNK // PIECE
    earlier = torch.arange(CHUNK, device=q.device) < PIECE * torch.arange(pieces, device=q.device)[:, None]
    # k_from is [b h z s l n]
    k_from = (start - total.unsqueeze(3)).masked_fill(~earlier[..., None], -torch.inf).exp() * k.unsqueeze(3)
    q, k, total = (part.unflatten(3, (pieces, PIECE)) for part in (q, k, total))
    between = (q * (total - start).exp()) @ k_from.transpose(4, 5)  # [b h z s r l]

    above = torch.ones(PIECE, PIECE, dtype=torch.bool, device=q.device).triu(1)[..., None]
    decay = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(above, -torch.inf).exp()  # [b h z s r r n]
    within = ((decay * k[..., None, :, :]) @ q[..., None]).squeeze(-1)  # [b h z s r r]
    on_diagonal = torch.eye(pieces, dtype=q.dtype, device=q.device)[:, None, :, None]
    between = between.unflatten(5, (pieces, PIECE)) + on_diagonal * within.unsqueeze(5)
    return between.flatten(5).flatten(3, 4)
