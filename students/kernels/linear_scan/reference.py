"""The diagonal recurrence in PyTorch: chunk by chunk, each token by token or by doubling; and a float64 oracle for tests."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from students.shapes import Bool, Float, Int

CHUNK = 256  # tokens scanned together; the backward pass holds the intermediate results of one chunk at a time


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the type of decays and states: float64 for float64, float32 for all narrower types."""
    return torch.promote_types(x.dtype, torch.float32)


def linear_scan(
    x: Float[Tensor, "b t d"],
    log_a: Float[Tensor, "b t d"],
    documents: Int[Tensor, "b t"] | None,
    initial_state: Float[Tensor, "b d"] | None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """See `students.kernels.linear_scan.linear_scan`. Memory is linear in t."""
    dtype = accumulator(x)
    state = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    goes_on = continues(documents)
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], CHUNK):
            piece = slice(start, start + CHUNK)
            here = None if goes_on is None else goes_on[:, piece, None]
            inputs = (x[:, piece], log_a[:, piece], here, state)
            h, state = checkpoint(_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
            outputs.append(h)
    return torch.cat(outputs, 1), state


def linear_scan_step(
    x: Float[Tensor, "b d"], log_a: Float[Tensor, "b d"], state: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """See `students.kernels.linear_scan.linear_scan_step`."""
    state = log_a.to(state.dtype).exp() * state + x.to(state.dtype)
    return state.to(x.dtype), state


def linear_scan_recurrence(
    x: Float[Tensor, "b t d"],
    log_a: Float[Tensor, "b t d"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b d"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """Compute the definition token by token in float64: a slow oracle for tests."""
    x, log_a = x.double(), log_a.double()
    state = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state.double()
    outputs = []
    for i in range(x.shape[1]):
        if documents is not None and i:
            state = state * (documents[:, i] == documents[:, i - 1]).double()[:, None]
        _, state = linear_scan_step(x[:, i], log_a[:, i], state)
        outputs.append(state)
    return torch.stack(outputs, 1), state


def continues(documents: Int[Tensor, "b t"] | None) -> Bool[Tensor, "b t"] | None:
    """Returns whether each token belongs to the document of the token before it; true for the first token."""
    if documents is None:
        return None
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    return torch.cat([first, documents[:, 1:] == documents[:, :-1]], 1)


def states_of(decay: Float[Tensor, "b t ..."], added: Float[Tensor, "b t ..."], state: Float[Tensor, "b ..."]) -> Tensor:
    """Compute h_t = decay_t h_{t-1} + added_t for every t, with h_{-1} = state.

    On a CPU, the loop goes token by token and reads everything once. On a GPU, one launch per token would be slow, so
    `_doubled` is used.
    """
    if decay.device.type != "cpu":
        return _doubled(decay, added, state)
    states = []
    for kept, new in zip(decay.unbind(1), added.unbind(1), strict=True):
        state = torch.addcmul(new, kept, state)
        states.append(state)
    return torch.stack(states, 1)


def _doubled(decay: Float[Tensor, "b t ..."], added: Float[Tensor, "b t ..."], state: Float[Tensor, "b ..."]) -> Tensor:
    """Compute the recurrence by recursive doubling (Hillis and Steele, 1986): each pass joins spans twice as long.

    It forms only products of decays and no quotients, so arbitrarily strong decays are exact.
    """
    added = torch.cat([added[:, :1] + decay[:, :1] * state[:, None], added[:, 1:]], 1)
    span = 1
    while span < added.shape[1]:
        added = torch.cat([added[:, :span], added[:, span:] + decay[:, span:] * added[:, :-span]], 1)
        decay = torch.cat([decay[:, :span], decay[:, span:] * decay[:, :-span]], 1)
        span *= 2
    return added


def _chunk(x: Tensor, log_a: Tensor, goes_on: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    decay = log_a.to(state.dtype).exp()
    if goes_on is not None:
        decay = decay.masked_fill(~goes_on, 0.0)
    h = states_of(decay, x.to(state.dtype), state)
    return h.to(x.dtype), h[:, -1].clone()  # a view would keep all of h until the backward pass
