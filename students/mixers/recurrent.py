"""Base of mixers with a recurrent state: the short convolution and its tail, attention's rows, half-lives."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from students.cache import MixerState, ScopedState, Turn
from students.kernels.causal_conv import causal_conv, conv_token
from students.mixers.entering import leaving
from students.mixers.mixer import Context, Mixer, Shape
from students.mixers.projections import fold_norm, per_head
from students.mixers.starts import HALF_LIVES, spread_half_lives
from students.mixers.transfer import Projections, Transfer
from students.shapes import Bool, Float, Int
from students.wrapped import numbers, taps


class Recurrent(Mixer):
    """Base of mixers with a recurrent state, with one term for each head; the output projection reads the heads in order."""

    has_decay = True
    output_name: ClassVar[str] = "out_proj"  # the attribute of the output projection

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads, self.head_dim = shape.n_heads, shape.head_dim
        self.sharing = shape.n_heads // shape.n_kv_heads  # heads that share a key head
        self.logit_scale, self.qk_norm = shape.logit_scale, shape.qk_norm

    def convolve(self, x: Float[Tensor, "b t c"], conv: nn.Module, activation: str | None, context: Context) -> Tensor:
        """The short convolution; its last inputs are kept in the state."""
        if context.turn is not None:
            return self._convolve_token(x, conv, activation, context)
        initial = None
        if context.state is not None:
            initial = context.state.read("conv")
            initial = None if initial is None else keep_rows(initial, context.resumed(x))
        weight, bias = taps(conv, x)
        documents = None if x.shape[1] == 1 else context.documents  # the tail before one token is cleared already
        y, tail = causal_conv(x, weight, bias, activation, documents, initial)
        if context.state is not None:
            context.state.write(conv=tail)
        return y

    def _convolve_token(
        self, x: Float[Tensor, "b 1 c"], conv: nn.Module, activation: str | None, context: Context
    ) -> Tensor:
        weight, bias = taps(conv, x)
        return conv_token(x[:, 0], weight, bias, activation, context.held.kept("conv"), context.column)[:, None]

    def hold(self, state: MixerState | ScopedState, turn: Turn, tokens: int) -> None:
        tail = state.read("conv")
        if tail is not None:  # one more place than is read, so that no program of a kernel writes what another reads
            state.write(conv=turn.laid(tail, tail.shape[1] + 1))

    def give_back(self, state: MixerState | ScopedState, turn: Turn, steps: int) -> None:
        ring = state.read("conv")
        if ring is not None:
            state.write(conv=turn.taken(ring, ring.shape[1] - 1, steps))

    def token_out(
        self, features: Float[Tensor, "b 1 k p"], residual: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b 1 d"]:
        return leaving(self.output_projection, features.flatten(2), residual)

    def out_weight(self) -> tuple[Float[Tensor, "h d p"], Float[Tensor, " d"] | None]:
        weight, bias = numbers(self.output_projection)
        return weight.unflatten(1, (self.n_heads, -1)).transpose(0, 1), bias

    def out(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t d"]:
        return self.output_projection(features.flatten(2))

    @property
    def output_projection(self) -> nn.Module:
        """The output projection: a linear layer, or a wrapper around one."""
        return getattr(self, self.output_name)

    def head_terms(self) -> list[list[int]]:
        return [[head] for head in range(self.n_heads)]

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " h"]) -> None:
        """Multiply each head's columns of the output projection by a factor; mixers with scales multiply these instead."""
        numbers(self.output_projection)[0].mul_(factors.repeat_interleave(self.head_dim))

    def memory_range(self) -> tuple[float, float]:
        return HALF_LIVES

    def spread_memories(self, name: str, transfer: Transfer) -> None:
        """Spread half-lives over the heads; `name`: their parameter, for the record."""
        shortest, longest = self.memory_range()
        self.set_half_lives(spread_half_lives(self.n_heads, shortest, longest).to(self.get_parameter(name)))
        transfer.set(name, f"set to half-lives of {shortest:g} to {longest:g} tokens, spread over the heads")

    def head_rows(self, attention: Projections, transfer: Transfer, names: str = "qkv") -> dict[str, Float[Tensor, "h p e"]]:
        """Attention's projections of these names, one set of rows for each head.

        A bias is one more column (e = d + 1), for an input that is always 1. The linear parts of norms on q and k are folded
        in, and the softmax scale into q. The projections used are added to `transfer.used`.
        """
        rows = {}
        for name in names:
            given: dict[str, Any] = {
                key: getattr(attention, key, None) for key in (name, f"{name}_bias", f"{name}_norm")
            }  # v has no norm
            weight, bias = fold_norm(given[name], given[f"{name}_bias"], given[f"{name}_norm"], self.qk_norm)
            column = weight.new_zeros((*weight.shape[:2], 1)) if bias is None else bias[..., None]
            rows[name] = per_head(torch.cat([weight, column], -1), self.n_heads)
            transfer.used |= {key for key, tensor in given.items() if tensor is not None}
        if "q" in rows:
            rows["q"] = rows["q"] * self.logit_scale
        return rows

    def set_taps(self, name: str, tap: float, transfer: Transfer) -> None:
        """Set the convolution `name` to `tap` times the identity."""
        weight = self.get_parameter(f"{name}.weight")
        weight.zero_()
        weight[:, :, -1] = tap
        transfer.set(f"{name}.weight", "set to the identity" + ("" if tap == 1 else f" times {tap}"))

    def copy_output(self, attention: Projections, transfer: Transfer) -> None:
        """Copy attention's output projection, and its bias if the mixer has one."""
        numbers(self.output_projection)[0].copy_(attention.o.transpose(0, 1).flatten(1))
        transfer.set(f"{self.output_name}.weight", "copied from attention o")
        transfer.used.add("o")
        self.copy_output_bias(attention, transfer)

    def copy_output_bias(self, attention: Projections, transfer: Transfer) -> None:
        """Copy the bias of attention's output projection, if the mixer has one."""
        bias, given = numbers(self.output_projection)[1], attention.o_bias
        if bias is None:
            return
        bias.copy_(torch.zeros_like(bias) if given is None else given)
        transfer.set(f"{self.output_name}.bias", "set to 0" if given is None else "copied from attention o bias")
        transfer.used |= set() if given is None else {"o_bias"}


def carried(
    scan: Callable, step: Callable, inputs: dict[str, Tensor], documents: Int[Tensor, "b t"] | None, context: Context
) -> Tensor:
    """A scan's output. In generation it continues from the state of the last call, and a single token uses `step`."""
    if context.state is None:
        return scan(**inputs, documents=documents)[0]
    first, state = next(iter(inputs.values())), context.state.read("ssm")
    if context.turn is None:
        state = None if state is None else keep_rows(state, context.resumed(first))
    if state is None or first.shape[1] > 1:
        y, state = scan(**inputs, documents=documents, initial_state=state)
    else:
        y, state = step(**{name: part[:, 0] for name, part in inputs.items()}, state=state)
        y = y[:, None]
    context.state.write(ssm=state)
    return y


def keep_rows(state: Float[Tensor, "b ..."], rows: Bool[Tensor, " b"] | None) -> Float[Tensor, "b ..."]:
    """The state with all rows cleared except `rows`; None keeps all."""
    if rows is None:
        return state
    return state * rows.to(state.dtype).view(-1, *(1,) * (state.dim() - 1))
