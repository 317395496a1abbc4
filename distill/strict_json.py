"""Writing of standard JSON, without NaN and Infinity, which Python writes and other programs refuse to read."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from distill.errors import UserError


def dumps(content: Any, where: str, indent: int | None = None) -> str:
    """Format content as JSON text.

    Args:
        where: the file that it is written to, for the message.

    Raises:
        UserError: a number is not finite; the message names its place.
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        place, value = _first_nonfinite(content, "") or ("", error)
        raise UserError(
            f"{where} cannot hold {place.lstrip('.')}: it is {value}, and JSON has only finite numbers; the measurement "
            "went wrong, and no file was changed"
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
