"""What a mixer is made from, the projections of an attention layer, and the record of what became of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from students.shapes import Float


@dataclass(frozen=True)
class Projections:
    """The tensors of one attention layer, head by head: head h uses key head h // (heads / key heads).

    a_h = softmax(scale N(q_h x + q_bias_h) . N(k x + k_bias)) (v x + v_bias), output = sum_h o_h a_h + o_bias

    where N is the attention's norm of q and k (`Shape.qk_norm`), times q_norm or k_norm, where it has one, and then rotary
    embedding. What the attention does not have is None.
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
        """The projections of these heads and key heads; the output bias belongs to no head and stays."""
        taken = {name: list(heads) for name in ("q", "o", "q_bias", "q_norm")}
        taken |= {name: list(key_heads) for name in ("k", "v", "k_bias", "v_bias", "k_norm")}
        given = {name: getattr(self, name) for name in taken}
        return replace(self, **{name: part[taken[name]] for name, part in given.items() if part is not None})


@dataclass
class Transfer:
    """Where a mixer's parameters and buffers came from, and which of the `Projections` they used, by name."""

    sources: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def set(self, name: str, source: str) -> None:
        """Record the source of one parameter; saying it twice replaces the first."""
        self.sources[name] = source

    def add(self, name: str, change: str) -> None:
        """Record what was done to a parameter after it was first set."""
        self.sources[name] = f"{self.sources[name]}; then {change}"

    def part(self, prefix: str) -> "Transfer":
        """What the record says of one branch, its names as that branch knows them; the reverse of `include`."""
        inside = f"{prefix}."
        return Transfer({n.removeprefix(inside): text for n, text in self.sources.items() if n.startswith(inside)})

    def include(self, prefix: str, other: "Transfer") -> None:
        """Take over another transfer's record, its names prefixed."""
        self.sources.update({f"{prefix}.{name}": source for name, source in other.sources.items()})
        self.used |= other.used
