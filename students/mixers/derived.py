"""A field of a frozen dataclass that is worked out when it is read, unless it was given.

What `mix` exchanges is a field `values` of the parts, one a term. Attention holds its values by key head, and composed
mixers hold those of their branches: neither copies them together where nobody asks.
"""

from collections.abc import Callable
from inspect import getattr_static
from typing import Any


class Derived:
    """The descriptor of such a field; where it was not given, `make` works it out from the other fields."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.slot = f"_given_{name}"

    def __get__(self, parts: Any, owner: type | None = None) -> Any:
        if parts is None:  # asked by `dataclass` for the default
            return None
        given = self.given(parts)
        return self.make(parts) if given is None else given

    def __set__(self, parts: Any, value: Any) -> None:
        parts.__dict__[self.slot] = value

    def given(self, parts: Any) -> Any:
        """What was given; None where it is worked out."""
        return parts.__dict__.get(self.slot)


def derived(make: Callable[[Any], Any]) -> Any:
    """A derived field's default: `Derived`, for type checkers whatever the field is."""
    return Derived(make)


def given(parts: Any, name: str) -> Any:
    """What was given for a derived field of `parts`."""
    return getattr_static(type(parts), name).given(parts)
