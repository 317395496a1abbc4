"""SSD in PyTorch: the chunked form of Listing 1 in arXiv 2405.21060, with documents and states; and an oracle for tests."""

import torch
from torch import Tensor, nn

from students.kernels.documents import runs as number_runs
from students.shapes import Float, Int

CHUNK = 64  # tokens of one masked square matrix
SEGMENT = 64  # chunks computed together; limits the matrix between chunks of a long sequence


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the type of decays, states and sums: float64 for float64, float32 for all narrower types."""
    return torch.promote_types(x.dtype, torch.float32)


def ssd(
    x: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    documents: Int[Tensor, "b t"] | None,
    initial_state: Float[Tensor, "b h p n"] | None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.ssd.ssd`. Memory is linear in t; Python loops over segments, not over tokens or chunks."""
    dtype, out_type = accumulator(x), x.dtype
    ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device) if documents is None else number_runs(documents)
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs, length = [], CHUNK * SEGMENT
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], length):
            piece = slice(start, start + length)
            if start:
                state = state * (ids[:, start] == ids[:, start - 1]).to(dtype)[:, None, None, None]
            parts = [part[:, piece].to(dtype) for part in (x, log_a, B, C)]
            y, state = _segment(parts, ids[:, piece], state)
            outputs.append(y)
    return torch.cat(outputs, 1).to(out_type), state


def ssd_step(
    x: Float[Tensor, "b h p"],
    log_a: Float[Tensor, "b h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.ssd.ssd_step`."""
    repeat, dtype = x.shape[1] // B.shape[1], state.dtype
    with torch.autocast(x.device.type, enabled=False):
        B, C = (part.to(dtype).repeat_interleave(repeat, 1) for part in (B, C))
        state = torch.addcmul(log_a.to(dtype).exp()[..., None, None] * state, x.to(dtype)[..., None], B[:, :, None])
        y = (state @ C[..., None]).squeeze(-1)
    return y.to(x.dtype), state


def ssd_recurrence(
    x: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Compute the definition token by token in float64: a slow oracle for tests."""
    x, log_a, B, C = (part.double() for part in (x, log_a, B, C))
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    if initial_state is not None:
        state = initial_state.double()
    outputs = []
    for i in range(x.shape[1]):
        if documents is not None and i:
            state = state * (documents[:, i] == documents[:, i - 1]).double()[:, None, None, None]
        y, state = ssd_step(x[:, i], log_a[:, i], B[:, i], C[:, i], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _segment(parts, ids, state):
    """Scan one segment of at most SEGMENT chunks. `state` belongs to the run of the first token.

    Inner tensors are [b g z r l .]: group, chunk, head of the group, token of the chunk.
    """
    x, log_a, B, C = parts
    time, groups = x.shape[1], B.shape[2]
    x, log_a, B, C, ids = _pad_to_chunks(x, log_a, B, C, ids)
    ids = ids.unflatten(1, (-1, CHUNK))  # [b z l]
    x = x.unflatten(2, (groups, -1)).unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 4, 2, 5)  # [b g z r l p]
    log_a = log_a.unflatten(2, (groups, -1)).unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 4, 2)  # [b g z r l]
    B, C = (part.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4).contiguous() for part in (B, C))  # [b g z l n]
    state = state.unflatten(1, (groups, -1))  # [b g r p n]
    total = log_a.cumsum(-1)  # log decay from the chunk's start through each token

    # 1. Outputs within a chunk, by the masked square matrix.
    hidden = ~(ids[:, :, :, None] == ids[:, :, None]).tril()[:, None, :, None]
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    y = (C @ B.transpose(3, 4)).unsqueeze(3) * decay @ x

    # 2. What each chunk adds to the state at its end; only the chunk's last run of a document counts.
    gone = (ids != ids[:, :, -1:])[:, None, :, None]
    to_end = (total[..., -1:] - total).masked_fill(gone, -torch.inf).exp()
    added = (x * to_end[..., None]).transpose(4, 5).flatten(3, 4) @ B  # [b g z r*p n]

    # 3. States at the chunks' ends: decayed sums over the initial state and the chunks so far.
    states = torch.cat([state[:, :, None], added.unflatten(3, (-1, x.shape[-1]))], 2)  # [b g 1+z r p n]
    elapsed = nn.functional.pad(total[..., -1].cumsum(2), (0, 0, 1, 0)).transpose(2, 3)  # [b g r 1+z]
    ends = torch.cat([ids[:, :1, 0], ids[:, :, -1]], 1)
    apart = ~(ends[:, :, None] == ends[:, None]).tril()[:, None, None]
    passed = (elapsed[..., :, None] - elapsed[..., None, :]).masked_fill(apart, -torch.inf).exp()
    states = torch.einsum("bgrzy,bgyrpn->bgzrpn", passed, states)

    # 4. Outputs from the state that enters each chunk, for the tokens of the run that the state belongs to.
    other = (ids != ends[:, :-1, None])[:, None, :, None]
    from_start = total.masked_fill(other, -torch.inf).exp()
    read = C @ states[:, :, :-1].flatten(3, 4).transpose(3, 4)  # [b g z l r*p]
    y = y + read.unflatten(4, (x.shape[3], -1)).transpose(3, 4) * from_start[..., None]
    y = y.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)  # [b t h p]
    return y[:, :time], states[:, :, -1].flatten(1, 2)


def _pad_to_chunks(x, log_a, B, C, ids):
    """Pad the last chunk with tokens that neither decay the state nor add to it."""
    missing = -x.shape[1] % CHUNK
    if missing == 0:
        return x, log_a, B, C, ids
    pad = nn.functional.pad
    x, B, C = (pad(part, (0, 0, 0, 0, 0, missing)) for part in (x, B, C))
    ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)
    return x, pad(log_a, (0, 0, 0, missing)), B, C, ids
