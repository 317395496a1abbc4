"""Rotary embedding by a rule that looks at the text's length: keys in a cache may have been turned by another.

longrope (arXiv 2402.13753) has two sets of factors: short ones, and long ones for every token of a text that is longer than
the original length. Dynamic NTK has others for every length beyond it. transformers turns a call's keys by the rule for the
length so far and leaves those of earlier calls as they are; what a text comes to is what it comes to when all of it is
computed at once. So a cache serves up to the original length, longrope's also when all that it holds came after the change,
and the token in between needs the text anew. And transformers' dynamic embedding goes on with the factors of the longest
text that it has ever seen; `forget_lengths` lets each call have its own.
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
    """One embedding's. longest: tokens of a text up to which it is as for the shortest. once: it changes there alone."""

    kind: str
    longest: int
    once: bool

    def room(self, length: int) -> int | None:
        """Tokens that may come behind a cache of so many before what it holds is out of date; None: as many as you like."""
        return None if self.once and length > self.longest else max(self.longest - length, 0)


@dataclass(frozen=True)
class LengthRules:
    """Those of a model; none for most."""

    rules: tuple[LengthRule, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LengthRules":
        """Read off a model's config, also where kinds of layers have embeddings of their own."""
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
        """Tokens that may come behind a cache of so many; None: as many as you like."""
        return min((room for rule in self.rules if (room := rule.room(length)) is not None), default=None)

    def refusal(self, length: int, tokens: int) -> str | None:
        """Why so many tokens cannot come behind a cache of that length; None where they can."""
        room = self.room(length)
        if room is None or tokens <= room:
            return None
        rule = next(rule for rule in self.rules if rule.room(length) == room)
        return (
            f"the {rule.kind} rotary embedding changes behind {rule.longest} tokens, and the {length} in the cache are "
            f"turned as those of a shorter text: {room} more may come, then compute the whole text anew"
        )


def forget_lengths(model: nn.Module) -> None:
    """Let every dynamic embedding in a model be that of the call's own length, whatever it was called with before."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget)


_turned_as_whole: ContextVar[bool] = ContextVar("embeddings know how long the text will be", default=False)


def turned_as_whole() -> bool:
    """Whether this runs inside `turned_as`."""
    return _turned_as_whole.get()


@contextmanager
def turned_as(model: nn.Module, length: int) -> Iterator[None]:
    """Inside the block every embedding that looks at a text's length finds this one: a prompt that comes in chunks is turned
    as it is when it comes at once."""
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
    """A hook that puts one more token behind a call's, of this position."""

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
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:  # one a kind of layer: 5.17, 5.24
        setattr(module, name, 0)


def lengths(
    past: int, tokens: int, positions: Int[Tensor, "rows t"] | None, mask: Int[Tensor, "b s"] | None
) -> tuple[int, int]:
    """The longest row before and after a call, as the embedding counts: by positions, where they are given."""
    if positions is None:
        return past, past + tokens
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask[:, -tokens:].bool()
    first = torch.where(real, positions, positions.max()).amin(1)
    last = torch.where(real, positions, positions.min()).amax()
    return int(first[real.any(1)].max() if bool(real.any()) else 0), int(last) + 1
