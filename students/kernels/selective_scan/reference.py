"""The selective scan in PyTorch: chunk by chunk, each token by token or by doubling; and a float64 oracle for tests."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from students.kernels.linear_scan.reference import accumulator, continues, states_of
from students.shapes import Float, Int

CHUNK = 64  # tokens whose states are in memory at the same time


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    documents: Int[Tensor, "b t"] | None,
    initial_state: Float[Tensor, "b d n"] | None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """See `students.kernels.selective_scan.selective_scan`. Both passes hold the states of one chunk at a time."""
    dtype = accumulator(x)
    state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    goes_on = continues(documents)
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], CHUNK):
            piece = slice(start, start + CHUNK)
            inputs = (x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], None if goes_on is None else goes_on[:, piece])
            y, state = checkpoint(_chunk, *inputs, state, use_reentrant=False, preserve_rng_state=False)
            outputs.append(y)
    return torch.cat(outputs, 1).to(x.dtype), state


def selective_scan_step(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d n"]]:
    """See `students.kernels.selective_scan.selective_scan_step`."""
    repeat, out_type = x.shape[1] // B.shape[1], x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = (part.to(state.dtype) for part in (x, dt, A, B, C))
        B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)
        state = (dt[..., None] * A).exp() * state + (dt * x)[..., None] * B
        y = (state * C).sum(-1)
    return y.to(out_type), state


def selective_scan_recurrence(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b d n"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Compute the definition token by token in float64: a slow oracle for tests."""
    x, dt, A, B, C = (part.double() for part in (x, dt, A, B, C))
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.double()
    outputs = []
    for i in range(x.shape[1]):
        if documents is not None and i:
            state = state * (documents[:, i] == documents[:, i - 1]).double()[:, None, None]
        y, state = selective_scan_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _chunk(x, dt, A, B, C, goes_on, state):
    """Compute one chunk's outputs and the state after it.

    Inner tensors are [b l g r n]: token, group, channel of the group.
    """
    groups = B.shape[2]
    x, dt, A, B, C = (part.to(state.dtype) for part in (x, dt, A, B, C))
    decay = (dt[..., None] * A).exp()
    if goes_on is not None:
        decay = decay.masked_fill(~goes_on[:, :, None, None], 0.0)
    added = (dt * x).unflatten(2, (groups, -1))[..., None] * B[:, :, :, None]
    states = states_of(decay, added.flatten(2, 3), state)
    y = states.unflatten(2, (groups, -1)) @ C[..., None]
    return y.squeeze(-1).flatten(2), states[:, -1].clone()  # a view would keep every state until the backward pass
