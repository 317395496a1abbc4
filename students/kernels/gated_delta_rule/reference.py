"""The gated delta rule in PyTorch: chunked by the WY / UT transform, one token, and a float64 oracle for tests.

Let G_i be the log decay from the start of a chunk through token i, and S the state that enters the chunk. Token i writes

    u_i = beta_i (v_i - exp(G_i) S k_i - sum_{j < i} exp(G_i - G_j) (k_i . k_j) u_j)

to the state. This is a triangular system. It is solved for all chunks at once, for both parts of its right side:
U = U0 - W S^T (arXiv 2406.06484, section 3; with decays arXiv 2412.06464, section 3.3). Only the state passes from chunk to
chunk.
"""

import torch
from torch import Tensor

from students.kernels.chunks import Chunks, chunks_of, cut, join
from students.kernels.ssd.reference import accumulator
from students.shapes import Float, Int

CHUNK = 64  # tokens in one triangular system


def gated_delta_rule(
    q: Float[Tensor, "b t g n"],
    k: Float[Tensor, "b t g n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    documents: Int[Tensor, "b t"] | None,
    initial_state: Float[Tensor, "b h p n"] | None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.gated_delta_rule.gated_delta_rule`. Python loops over chunks, not over tokens."""
    dtype, repeat = accumulator(v), v.shape[2] // k.shape[2]
    state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    chunks = chunks_of(documents, v, CHUNK)
    with torch.autocast(v.device.type, enabled=False):
        q, k = (part.repeat_interleave(repeat, 2) for part in (q, k))
        q, k, values, log_a, beta = (cut(part, CHUNK, dtype) for part in (q, k, v, log_a, beta))
        y, state = _chunked(q, k, values, log_a, beta, chunks, state)
    return join(y, v.shape[1]).to(v.dtype), state


def gated_delta_rule_step(
    q: Float[Tensor, "b g n"],
    k: Float[Tensor, "b g n"],
    v: Float[Tensor, "b h p"],
    log_a: Float[Tensor, "b h"],
    beta: Float[Tensor, "b h"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.gated_delta_rule.gated_delta_rule_step`."""
    repeat, dtype = v.shape[1] // k.shape[1], state.dtype
    with torch.autocast(v.device.type, enabled=False):
        q, k = (part.to(dtype).repeat_interleave(repeat, 1)[..., None] for part in (q, k))  # [b h n 1]
        state = log_a.to(dtype).exp()[..., None, None] * state
        written = beta.to(dtype)[..., None] * (v.to(dtype) - (state @ k).squeeze(-1))
        state = state + written[..., None] * k.transpose(2, 3)
        y = (state @ q).squeeze(-1)
    return y.to(v.dtype), state


def gated_delta_recurrence(
    q: Float[Tensor, "b t g n"],
    k: Float[Tensor, "b t g n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Compute the definition token by token in float64: a slow oracle for tests.

    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    """
    repeat = v.shape[2] // k.shape[2]
    q, k = (part.double().repeat_interleave(repeat, 2) for part in (q, k))
    v, a, beta = v.double(), log_a.double().exp(), beta.double()
    identity = torch.eye(k.shape[3], dtype=torch.float64, device=v.device)
    state = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    if initial_state is not None:
        state = initial_state.double()
    outputs = []
    for t in range(v.shape[1]):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1]).double()[:, None, None, None]
        rate = beta[:, t, :, None, None]
        erase = identity - rate * torch.einsum("bhn,bhm->bhnm", k[:, t], k[:, t])
        state = a[:, t, :, None, None] * state @ erase + rate * torch.einsum("bhp,bhn->bhpn", v[:, t], k[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, t]))
    return torch.stack(outputs, 1), state


def _chunked(q, k, v, log_a, beta, chunks: Chunks, state):
    """Scan tensors of shape [b h z l .]: z chunks of l tokens."""
    total = log_a.cumsum(-1)  # G
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~chunks.pairs, -torch.inf).exp()
    from_start = total.masked_fill(~chunks.entered, -torch.inf).exp()[..., None]
    to_end = (total[..., -1:] - total).masked_fill(~chunks.leaving, -torch.inf).exp()[..., None]
    kept = total[..., -1].masked_fill(~chunks.through, -torch.inf).exp()[..., None, None]

    beta = beta[..., None]
    system = beta * (k @ k.transpose(3, 4)) * decay  # the solver takes its diagonal as 1
    right = beta * torch.cat([v, from_start * k], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, read = solved.split([v.shape[-1], k.shape[-1]], -1)  # U0 and W
    outgoing = to_end * k
    states, written = [], []
    for z in range(k.shape[2]):
        states.append(state)
        written.append(own[:, :, z] - read[:, :, z] @ state.transpose(2, 3))
        state = kept[:, :, z] * state + written[-1].transpose(2, 3) @ outgoing[:, :, z]
    within = ((q @ k.transpose(3, 4)) * decay) @ torch.stack(written, 2)
    return from_start * q @ torch.stack(states, 2).transpose(3, 4) + within, state
