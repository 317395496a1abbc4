"""Ranges of numbers for options and recipe keys: the lowest and the highest valid value, which messages name.

A range is wider than any real use, and refuses values that can only be mistakes: a batch of 10^12, a length of 10^8.
It is used in the annotation of a schema's field (`Annotated[int, whole(1, 64)]`), as the callback of a command-line option
(`callback=TOKENS.option("--tokens")`), and through `check` in the Python API.
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

LONGEST = 2**20  # tokens of a sequence: the most positions of any teacher
MANY = 10**6  # trials, items, documents, steps between two saves
DISTANT = 10**9  # a step or token number


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included. `above` excludes the lower end, `below` the upper end.

    whole: only whole numbers; `check` and options need it, a schema's field has its type. or_zero: 0 is valid too, with a
    meaning of its own.
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
        """Whether a number is in the range; NaN is in no range."""
        if self.or_zero and value == 0:
            return True
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __call__(self, value: float) -> float:
        """Return the number; -0 becomes 0.

        Raises:
            ValueError: it is not in the range.
        """
        if value not in self:
            raise ValueError(f"it should be {self}")
        return value + 0  # makes 0.0 of -0.0, since the two would give different fingerprints

    def check(self, value: Any, where: str) -> Any:
        """Check the number that the user gave for `where`, and return it; None stays None.

        Raises:
            UserError: it is not a number, or not in the range; the message names the value and the range.
        """
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value not in self or (self.whole and not isinstance(value, int)):
            raise UserError(f"{where} is {shown(value)}; it takes {self}")
        return value + 0

    def option(self, name: str) -> Callable[[Any], Any]:
        """The callback of a command-line option. name: the option as the user types it."""

        def callback(value: Any) -> Any:
            return self.check(value, name)

        cast(Any, callback).range = self
        return callback

    def __get_pydantic_core_schema__(self, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        """Let pydantic check the type, then the range. The range refuses NaN and infinity, with a better message."""
        from pydantic_core import core_schema  # not at the top: `distill --help` needs no pydantic

        inner = core_schema.float_schema(allow_inf_nan=True) if source is float else handler(source)

        def validate(value: Any, of_type: Callable[[Any], float]) -> float:
            beyond = isinstance(value, int) and abs(value) > sys.float_info.max  # not a float, and in no range
            return self(value if beyond else of_type(value))

        return core_schema.no_info_wrap_validator_function(validate, inner)

    def __get_pydantic_json_schema__(self, schema: "CoreSchema", handler: "GetJsonSchemaHandler") -> dict[str, Any]:
        """The type's JSON schema with the two ends of the range."""
        ends = {"exclusiveMinimum" if self.above else "minimum": 0 if self.or_zero else self.low}
        ends["exclusiveMaximum" if self.below else "maximum"] = self.high
        return handler(schema) | ends


def whole(low: int, high: int) -> Range:
    """Whole numbers from `low` to `high`, both included."""
    return Range(low, high, whole=True)


SHARE = Range(0, 1)

# options of the command line and the Python API
PROCESSES = whole(1, 65_536)  # processes of a run; on GPUs each has its own
MINUTES = Range(0, 1e6, above=True)  # time limit of a run
NEW_TOKENS = whole(1, LONGEST)
TOP_K = whole(1, 2**20)  # most likely tokens of a distribution that are kept
CHUNK = whole(1, LONGEST)  # tokens of a prompt at a time
ANSWERED = whole(1, 65_536)  # batch size of answers
TEMPERATURE = Range(1e-3, 1e3, or_zero=True)  # of sampling; 0 takes the most likely token; below 1e-3 logits overflow
TOP_P = Range(0, 1, above=True)  # of nucleus sampling
SEEDS = whole(0, 2**63 - 1)
ROWS = whole(1, 2**40)  # prompts to answer
PREPARING = whole(1, 1024)  # processes that prepare text
SHOWN = whole(0, 1000)  # documents to show
GPU_GIB = Range(0, 1e5, above=True)  # memory of a GPU
KEPT = Range(0, MANY, above=True)  # number or share of layers or heads


def _said(value: float) -> str:
    return f"{int(value):,}" if math.isfinite(value) and value == int(value) else f"{value:g}"
