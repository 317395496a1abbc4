"""The projections of an attention layer, from which a mixer is made, and the record of the sources of its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from students.shapes import Float


@dataclass(frozen=True)
class Projections:
    """The tensors of one attention layer, head by head: head h uses key head h // (heads / key heads).

    a_h = softmax(scale N(q_h x + q_bias_h) . N(k x + k_bias)) (v x + v_bias), output = sum_h o_h a_h + o_bias

    N is the attention's norm of q and k (`Shape.qk_norm`), if it has one, times q_norm or k_norm, and then the rotary
    embedding. A tensor that the attention does not have is None.
    """

    q: Float[Tensor, "h p d"]
    k: Float[Tensor, "kv p d"]
    v: Float[Tensor, "kv p d"]
    o: Float[Tensor, "h d p"]
    q_bias: Float[Tensor, "h p"] | None = None
    k_bias: Float[Tensor, "kv p"] | None = None
    v_bias: Float[Tensor, "kv p"] | None = None
    o_bias: Float[Tensor, " d"] | None = None
    q_norm: Float[Tensor, "h p"] | None = None
    k_norm: Float[Tensor, "kv p"] | None = None

    @property
    def biased(self) -> bool:
        """Whether q, k or v has a bias."""
        return any(bias is not None for bias in (self.q_bias, self.k_bias, self.v_bias))

    def of_heads(self, heads: Sequence[int], key_heads: Sequence[int]) -> "Projections":
        """The projections of these heads and key heads, with the whole output bias, which belongs to no head."""
        taken = {name: list(heads) for name in ("q", "o", "q_bias", "q_norm")}
        taken |= {name: list(key_heads) for name in ("k", "v", "k_bias", "v_bias", "k_norm")}
        given = {name: getattr(self, name) for name in taken}
        return replace(self, **{name: part[taken[name]] for name, part in given.items() if part is not None})


@dataclass
class Transfer:
    """The record of a transfer: the source of each parameter and buffer of a mixer, and the projections used, by name."""

    sources: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def set(self, name: str, source: str) -> None:
        """Record the source of one parameter, in place of an earlier one."""
        self.sources[name] = source

    def add(self, name: str, change: str) -> None:
        """Record a later change of a parameter."""
        self.sources[name] = f"{self.sources[name]}; then {change}"

    def part(self, prefix: str) -> "Transfer":
        """The record of one branch, with names without its prefix; the reverse of `include`."""
        inside = f"{prefix}."
        return Transfer({n.removeprefix(inside): text for n, text in self.sources.items() if n.startswith(inside)})

    def include(self, prefix: str, other: "Transfer") -> None:
        """Add another record, with `prefix` before its names."""
        self.sources.update({f"{prefix}.{name}": source for name, source in other.sources.items()})
        self.used |= other.used
