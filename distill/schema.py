"""The base of all schemas: strict models, counts and names, and messages that name the key and the nearest valid one.

The recipe, the options of each stage and the options of each scorer are schemas; each is in the module that uses it.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from distill.errors import nearest, shown
from distill.ranges import whole

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema

LONGEST = 200  # bytes of a name; file names add a fingerprint and more to it
MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
ALTERNATIVE = re.compile(r"[\[(]|^(bool|float|int|str)$")  # a part that pydantic adds to a key's path
WORDS = {
    "Input should": "it should",
    "dictionary": "mapping",
    "a valid boolean": "true or false",
    " or instance of TextSource": "",
}


def count(value: Any) -> Any:
    """Parse 24000, "24k", "80M" or "2.8B" into a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([kMB]?)", str(value).replace("_", ""), re.ASCII)
    number = Decimal(match[1]) * MULTIPLES[match[2]] if match and not isinstance(value, bool) else None
    if number is None or number != int(number):
        raise ValueError(f"{shown(value)} is not a count; write it like 24000, 24k, 80M or 2.8B")
    return int(number)


def _name(value: str) -> str:
    if not re.fullmatch(r"[^/\\\s.][^/\\\n]*", value):
        raise ValueError("it should be a name that a folder may have, without / and not beginning with a dot")
    if len(value.encode()) > LONGEST:
        raise ValueError(f"it should be a name that a folder may have, of {LONGEST} bytes at most")
    return value


def _letter(value: str) -> str:
    if not re.fullmatch("[A-Z]", value):
        raise ValueError("a mixer is given for one capital letter of pattern")
    return value


@dataclass(frozen=True)
class Written:
    """The annotation that allows the notation of `count` in the JSON schema of a whole number."""

    PATTERN: ClassVar[str] = r"^[0-9][0-9_]*(\.[0-9_]+)?\s*[kMB]?$"

    def __get_pydantic_json_schema__(self, schema: "CoreSchema", handler: "GetJsonSchemaHandler") -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "string", "pattern": self.PATTERN}]}


COUNTED = (BeforeValidator(count), Written())
Count = Annotated[int, *COUNTED, whole(1, 10**13)]  # of tokens; the largest training runs read about 10^13
Name = Annotated[str, AfterValidator(_name)]
Letter = Annotated[str, AfterValidator(_letter)]


class Schema(BaseModel):
    """Base of every schema: unknown keys are refused, types are not converted, and instances are immutable.

    reserved: keys for features that are not built yet; the message of their refusal says so. renamed: earlier names of
    keys, and what to write instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    reserved: ClassVar[frozenset[str]] = frozenset()
    renamed: ClassVar[dict[str, str]] = {}


def explain(error: ValidationError, where: str, schema: type[Schema]) -> str:
    """The message of a validation error, one line for each key; of a key's alternative types only the closest are named."""
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        place = [str(part) for part in problem["loc"] if not ALTERNATIVE.search(str(part))]
        key, reason = ".".join(place), _reason(cast(dict, problem), place, schema)
        found.setdefault(key, [f"{key}{reason}".lstrip(": ")]).append(reason.partition(": ")[2])
    innermost = [key for key in found if not any(other.startswith(f"{key}.") for other in found if key)]
    return "\n".join(f"{where}: {', or '.join([found[key][0], *found[key][2:]])}" for key in innermost)


def _reason(problem: dict, place: list[str], schema: type[Schema]) -> str:
    if problem["type"] == "extra_forbidden":
        within = _schema_at(schema, place[:-1])
        if place[-1] in within.renamed:
            return f" is now {within.renamed[place[-1]]}"
        return (
            " is not built yet"
            if place[-1] in within.reserved
            else f" is not a key here; {nearest(place[-1], within.model_fields)}"
        )
    if problem["type"] == "missing":
        return " is missing"
    said = problem["msg"].removeprefix("Value error, ")
    for pydantic, ours in WORDS.items():
        said = said.replace(pydantic, ours)
    whole_entry = isinstance(problem["input"], dict) and problem["type"] == "value_error"  # too long for the message
    return f": {said}" if whole_entry else f" is {shown(problem['input'])}: {said}"


def _schema_at(schema: type[Schema], place: list[str]) -> type[Schema]:
    """The schema at a place inside another schema; list indexes are skipped."""
    for part in place:
        if part.isdigit():
            continue
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        inner = [annotation, *getattr(annotation, "__args__", ())]
        schema = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, Schema)), schema)
    return schema
