"""A field of a frozen dataclass that is computed from the other fields when it is read, unless it was given.

`mix` exchanges the field `values` of a mixer's parts, which has one entry a term. Attention stores values by key head, and
composed mixers store those of their branches; a derived field expands or concatenates them only where it is read.
"""

from collections.abc import Callable
from inspect import getattr_static
from typing import Any


class Derived:
    """The descriptor of a derived field; `make` computes it from the other fields if it was not given."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.slot = f"_given_{name}"

    def __get__(self, parts: Any, owner: type | None = None) -> Any:
        if parts is None:  # `dataclass` reads the default
            return None
        given = self.given(parts)
        return self.make(parts) if given is None else given

    def __set__(self, parts: Any, value: Any) -> None:
        parts.__dict__[self.slot] = value

    def given(self, parts: Any) -> Any:
        """The given value; None if the field is computed."""
        return parts.__dict__.get(self.slot)


def derived(make: Callable[[Any], Any]) -> Any:
    """The default of a derived field: a `Derived`, which type checkers take for any type."""
    return Derived(make)


def given(parts: Any, name: str) -> Any:
    """The given value of a derived field of `parts`; None if the field is computed."""
    return getattr_static(type(parts), name).given(parts)
