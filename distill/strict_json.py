"""JSON as its standard has it: no NaN and no Infinity, which Python writes and other programs refuse to read."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from distill.errors import UserError


def dumps(content: Any, where: str, indent: int | None = None) -> str:
    """Content as JSON text.

    Args:
        where: what it is written to, for the message.

    Raises:
        UserError: a number in it is not finite, naming where it stands.
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        place, value = _first_nonfinite(content, "") or ("", error)
        raise UserError(
            f"{where} cannot hold {place.lstrip('.')}: it is {value}, and JSON has finite numbers alone; what was measured "
            "went wrong, and nothing was written over"
        ) from error


def _first_nonfinite(content: Any, place: str) -> tuple[str, float] | None:
    if isinstance(content, float):
        return None if math.isfinite(content) else (place, content)
    if isinstance(content, Mapping):
        parts: Iterable[tuple[Any, Any]] = content.items()
    elif isinstance(content, list | tuple):
        parts = enumerate(content)
    else:
        return None
    return next(filter(None, (_first_nonfinite(value, f"{place}.{key}") for key, value in parts)), None)
