"""What mixers with a short convolution and a recurrent state share: the convolution's tail, attention's rows, half-lives."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from students.kernels.causal_conv import causal_conv
from students.mixers.mixer import Context, Mixer, Shape, Transfer
from students.mixers.projections import fold_norm, per_head
from students.shapes import Bool, Float, Int


class Recurrent(Mixer):
    """Base of these mixers: a term a head, and an out_proj that reads them one after the other unless a mixer says more."""

    has_decay = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads, self.head_dim = shape.n_heads, shape.head_dim
        self.sharing = shape.n_heads // shape.n_kv_heads  # heads that share a key head
        self.logit_scale, self.qk_norm = shape.logit_scale, shape.qk_norm

    def convolve(self, x: Float[Tensor, "b t c"], conv: nn.Conv1d, activation: str | None, context: Context) -> Tensor:
        """The short convolution, its tail kept in the state."""
        initial = None
        if context.state is not None:
            initial = context.state.read("conv")
            initial = None if initial is None else keep_rows(initial, context.resumed(x))
        weight = conv.weight.squeeze(1)
        documents = None if x.shape[1] == 1 else context.documents  # what came before one token is cleared already
        y, tail = causal_conv(x, weight, conv.bias, activation, documents, initial)
        if context.state is not None:
            context.state.write(conv=tail)
        return y

    def out_weight(self) -> tuple[Float[Tensor, "h d p"], Float[Tensor, " d"] | None]:
        return self.out_proj.weight.unflatten(1, (self.n_heads, -1)).transpose(0, 1), self.out_proj.bias

    def head_terms(self) -> list[list[int]]:
        return [[head] for head in range(self.n_heads)]

    def memory_range(self) -> tuple[float, float]:
        """Half-lives in tokens, the shortest and the longest that its heads begin with."""
        return 4.0, 512.0

    def spread_memories(self, name: str, transfer: Transfer) -> None:
        """Spread half-lives over the heads; `name`: the parameter that holds them."""
        shortest, longest = self.memory_range()
        self.set_half_lives(spread_half_lives(self.n_heads, shortest, longest).to(self.get_parameter(name)))
        transfer.set(name, f"set to half-lives of {shortest:g} to {longest:g} tokens, spread over the heads")

    def head_rows(
        self,
        projections: dict[str, Tensor],
        biases: dict[str, Tensor | None],
        norms: dict[str, Tensor | None],
        used: set[str],
    ) -> dict[str, Float[Tensor, "h p e"]]:
        """Attention's projections by name (q, k, v), a set of rows a head.

        A bias is one more column (e = d + 1), as if an input were always 1. What is linear in norms on q and k is folded
        in, and the softmax scale into q. What was used is added to `used`.
        """
        rows = {}
        for name, weight in projections.items():
            weight, bias = fold_norm(weight, biases[name], norms.get(name), self.qk_norm)
            column = weight.new_zeros((*weight.shape[:2], 1)) if bias is None else bias[..., None]
            rows[name] = per_head(torch.cat([weight, column], -1), self.n_heads)
        used |= set(projections) | {f"{name}_bias" for name, bias in biases.items() if bias is not None}
        used |= {f"{name}_norm" for name, norm in norms.items() if norm is not None}
        if "q" in rows:
            rows["q"] = rows["q"] * self.logit_scale
        return rows

    def copy_output_bias(self, o_bias: Float[Tensor, " d"] | None, transfer: Transfer, name: str = "out_proj") -> None:
        """Take over the bias of attention's output projection, where the projection of that name has one."""
        bias = getattr(self, name).bias
        if bias is None:
            return
        bias.copy_(torch.zeros_like(bias) if o_bias is None else o_bias)
        transfer.set(f"{name}.bias", "set to 0" if o_bias is None else "copied from attention o bias")
        transfer.used |= set() if o_bias is None else {"o_bias"}


def carried(
    scan: Callable, step: Callable, inputs: dict[str, Tensor], documents: Int[Tensor, "b t"] | None, context: Context
) -> Tensor:
    """A scan's output; in generation it goes on from the state that the last call left, one token by `step`."""
    if context.state is None:
        return scan(**inputs, documents=documents)[0]
    first, state = next(iter(inputs.values())), context.state.read("ssm")
    state = None if state is None else keep_rows(state, context.resumed(first))
    if state is None or first.shape[1] > 1:
        y, state = scan(**inputs, documents=documents, initial_state=state)
    else:
        y, state = step(**{name: part[:, 0] for name, part in inputs.items()}, state=state)
        y = y[:, None]
    context.state.write(ssm=state)
    return y


def keep_rows(state: Float[Tensor, "b ..."], rows: Bool[Tensor, " b"] | None) -> Float[Tensor, "b ..."]:
    """Clear the state of every row but these; None keeps all."""
    if rows is None:
        return state
    return state * rows.to(state.dtype).view(-1, *(1,) * (state.dim() - 1))


def spread_half_lives(heads: int, shortest: float = 4.0, longest: float = 512.0) -> Float[Tensor, " h"]:
    """Half-lives in tokens, spread evenly on a logarithmic scale over the heads."""
    return torch.logspace(torch.tensor(shortest).log2(), torch.tensor(longest).log2(), heads, base=2.0)
