"""Rotary embeddings whose factors depend on the sequence's length, and what this means for cached keys.

longrope (arXiv 2402.13753) has two sets of factors: short ones, and long ones for all tokens of a sequence that is longer
than the original length. Dynamic NTK has different factors for every length beyond the original one. transformers rotates
the keys of a call with the factors for the length so far, and leaves cached keys unchanged. This project wants the result of
one call with the whole sequence. So a cache is valid up to the original length; with longrope also if all of its keys were
rotated with the long factors. The token at which the factors change needs the whole sequence again.

transformers' dynamic embedding also keeps the factors of the longest sequence that it has seen; `forget_lengths` makes each
call use its own length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from students.shapes import Int


@dataclass(frozen=True)
class LengthRule:
    """The rule of one embedding.

    longest: the length up to which the factors do not change. once: they change only there (longrope).
    """

    kind: str
    longest: int
    once: bool

    def room(self, length: int) -> int | None:
        """How many tokens may follow a cache of `length` tokens before it is out of date; None: any number."""
        return None if self.once and length > self.longest else max(self.longest - length, 0)


@dataclass(frozen=True)
class LengthRules:
    """The length rules of a model; most models have none."""

    rules: tuple[LengthRule, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LengthRules":
        """Read from a model's config, also where each type of layer has its own embedding."""
        config = config.get_text_config(decoder=True)
        found = getattr(config, "rope_parameters", None) or {}
        rules = []
        for entry in [found, *found.values()]:
            kind = (entry.get("rope_type") or entry.get("type") or "") if isinstance(entry, dict) else ""
            if kind == "longrope":
                original = entry.get("original_max_position_embeddings")
                rules.append(LengthRule(kind, original or config.original_max_position_embeddings, once=True))
            elif "dynamic" in kind:
                rules.append(LengthRule(kind, config.max_position_embeddings, once=False))
        return cls(tuple(rules))

    def __bool__(self) -> bool:
        return bool(self.rules)

    def room(self, length: int) -> int | None:
        """How many tokens may follow a cache of `length` tokens; None: any number."""
        return min((room for rule in self.rules if (room := rule.room(length)) is not None), default=None)

    def refusal(self, length: int, tokens: int) -> str | None:
        """Why `tokens` tokens cannot follow a cache of `length` tokens; None if they can."""
        room = self.room(length)
        if room is None or tokens <= room:
            return None
        rule = next(rule for rule in self.rules if rule.room(length) == room)
        return (
            f"the {rule.kind} rotary embedding changes after {rule.longest} tokens, and the {length} tokens in the cache "
            f"are rotated for a shorter sequence: {room} more may follow, then compute the whole sequence again"
        )


def forget_lengths(model: nn.Module) -> None:
    """Make every dynamic embedding of a model use the length of the current call, and not of earlier calls."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget)


_turned_as_whole: ContextVar[bool] = ContextVar("whether embeddings use the length of a whole prompt", default=False)


def turned_as_whole() -> bool:
    """Whether this runs inside `turned_as`."""
    return _turned_as_whole.get()


@contextmanager
def turned_as(model: nn.Module, length: int) -> Iterator[None]:
    """Inside the block, every embedding with a length rule uses `length`: chunks of a prompt are rotated as the whole prompt
    would be."""
    hooks, token = [], _turned_as_whole.set(True)
    try:
        for module in model.modules():
            if any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope")):
                hooks.append(module.register_forward_pre_hook(_with_last(length - 1), with_kwargs=True))
                hooks.append(module.register_forward_hook(_without_last))
        yield
    finally:
        _turned_as_whole.reset(token)
        for hook in hooks:
            hook.remove()


def _with_last(position: int):
    """A hook that appends one more position id, `position`, to a call."""

    def hook(module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        if "position_ids" in keywords:
            return arguments, keywords | {"position_ids": longer(keywords["position_ids"])}
        return (arguments[0], longer(arguments[1]), *arguments[2:]), keywords

    def longer(positions: Tensor) -> Tensor:
        return torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), position)], -1)

    return hook


def _without_last(module: nn.Module, arguments: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(table[..., :-1, :] for table in tables)


def _forget(module: nn.Module, arguments: tuple) -> None:
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:  # one per layer type: 5.17, 5.24
        setattr(module, name, 0)


def lengths(
    past: int, tokens: int, positions: Int[Tensor, "rows t"] | None, mask: Int[Tensor, "b s"] | None
) -> tuple[int, int]:
    """The longest row before and after a call, by position ids where they are given, as the embedding counts."""
    if positions is None:
        return past, past + tokens
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask[:, -tokens:].bool()
    first = torch.where(real, positions, positions.max()).amin(1)
    last = torch.where(real, positions, positions.min()).amax()
    return int(first[real.any(1)].max() if bool(real.any()) else 0), int(last) + 1
