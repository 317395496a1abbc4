"""The numbers that an option or a key of a recipe may be: a lowest and a highest one, said in messages.

A range is meant to be wider than any use, and narrower than what could only be a slip: a batch of 10^12, a length of 10^8.
It stands in the annotation of a schema's field (`Annotated[int, whole(1, 64)]`), and beside an option of the command line
(`callback=TOKENS.option("--tokens")`); `check` is for whoever calls the Python API.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from distill.errors import UserError, shown

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

LONGEST = 2**20  # tokens of a text or a window, the longest that any teacher has positions for
MANY = 10**6  # trials, items, documents, steps between two saves
DISTANT = 10**9  # steps or tokens that somebody counts up to


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them unless `above` or `below` leaves the lower or the upper one out.

    whole: only whole numbers, which `check` and options ask for; a schema's field says it by its type. or_zero: 0 too, which
    then means something else than a small number.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False
    or_zero: bool = False

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        first = f"above {_said(self.low)}" if self.above else f"from {_said(self.low)}"
        last = f"and below {_said(self.high)}" if self.below else f"{'up ' if self.above else ''}to {_said(self.high)}"
        return f"{'0 or ' if self.or_zero else ''}a {kind} {first} {last}"

    def __contains__(self, value: float) -> bool:
        """Whether a number is one of these; NaN is in no range."""
        if self.or_zero and value == 0:
            return True
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __call__(self, value: float) -> float:
        """The number, 0 where it is -0.

        Raises:
            ValueError: it is not in the range.
        """
        if value not in self:
            raise ValueError(f"it should be {self}")
        return value + 0  # of -0.0 this is 0.0, which a fingerprint tells from it

    def check(self, value: Any, where: str) -> Any:
        """The number that somebody gave as `where`; None stays None.

        Raises:
            UserError: it is no number, or not in the range; naming it and what it may be.
        """
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value not in self or (self.whole and not isinstance(value, int)):
            raise UserError(f"{where} is {shown(value)}; it takes {self}")
        return value + 0

    def option(self, name: str) -> Callable[[Any], Any]:
        """The callback of an option of the command line, `name` as it is typed."""

        def callback(value: Any) -> Any:
            return self.check(value, name)

        cast(Any, callback).range = self
        return callback

    def __get_pydantic_core_schema__(self, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        """What pydantic checks: the type as always, then the range, which says more of NaN and infinity than the type."""
        from pydantic_core import core_schema  # not at the top: `distill --help` needs no pydantic

        inner = core_schema.float_schema(allow_inf_nan=True) if source is float else handler(source)

        def validate(value: Any, of_type: Callable[[Any], float]) -> float:
            beyond = isinstance(value, int) and abs(value) > sys.float_info.max  # which is no float, and in no range
            return self(value if beyond else of_type(value))

        return core_schema.no_info_wrap_validator_function(validate, inner)

    def __get_pydantic_json_schema__(self, schema: "CoreSchema", handler: "GetJsonSchemaHandler") -> dict[str, Any]:
        """The type's JSON schema, with the two ends."""
        ends = {"exclusiveMinimum" if self.above else "minimum": 0 if self.or_zero else self.low}
        ends["exclusiveMaximum" if self.below else "maximum"] = self.high
        return handler(schema) | ends


def whole(low: int, high: int) -> Range:
    """Whole numbers, both ends among them."""
    return Range(low, high, whole=True)


SHARE = Range(0, 1)

# of the command line and the Python API
PROCESSES = whole(1, 65_536)  # that share a run, each with a GPU of its own where there are any
MINUTES = Range(0, 1e6, above=True)  # that a run may be given
NEW_TOKENS = whole(1, LONGEST)
TOP_K = whole(1, 2**20)  # likeliest tokens of a distribution that are kept
CHUNK = whole(1, LONGEST)  # tokens of a prompt at a time
ANSWERED = whole(1, 65_536)  # prompts at once
TEMPERATURE = Range(1e-3, 1e3, or_zero=True)  # of sampling; 0 takes the likeliest token, and colder logits overflow
TOP_P = Range(0, 1, above=True)  # of the distribution that sampling draws from
SEEDS = whole(0, 2**63 - 1)
ROWS = whole(1, 2**40)  # prompts that are answered
PREPARING = whole(1, 1024)  # processes that prepare text
SHOWN = whole(0, 1000)  # documents that are shown
GPU_GIB = Range(0, 1e5, above=True)  # of memory
KEPT = Range(0, MANY, above=True)  # layers or heads, or a share of them


def _said(value: float) -> str:
    return f"{int(value):,}" if math.isfinite(value) and value == int(value) else f"{value:g}"
