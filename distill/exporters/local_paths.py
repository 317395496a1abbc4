"""Removal of local paths from an export's configs: each path is replaced by its last component."""

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

NAMED = re.compile(r"(.*_)?(name_or_path|file|path|folder|reference)")  # keys whose value may be a path
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def name_of(reference: str) -> str:
    """Return a teacher's reference for publication: the last component of a local path, any other reference unchanged."""
    if not is_local(reference):
        return reference
    kind = PureWindowsPath if "\\" in reference else PurePosixPath
    return kind(reference.rstrip("/\\")).name or "local"


def is_local(reference: str) -> bool:
    """Whether a reference is a path on a local disk, whether or not it exists now."""
    if reference.startswith("package:"):
        return False
    if reference.startswith((".", "/", "~")) or PureWindowsPath(reference).is_absolute() or reference.count("/") > 1:
        return True
    try:
        return Path(reference).exists()
    except (OSError, ValueError):
        return False


def take_out(folder: Path) -> None:
    """Replace local paths in the configs of a folder, in place.

    Raises:
        OSError: a file cannot be written. ValueError: a config is not JSON.
    """
    for file in filter(Path.is_file, (folder / name for name in FILES)):
        content = json.loads(file.read_text("utf-8"))
        cleaned = _cleaned(content)
        if cleaned != content:
            file.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _cleaned(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _cleaned(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner, key) for inner in value]
    if isinstance(value, str) and value and NAMED.fullmatch(key):
        absolute = value.startswith(("/", "~", "./", "../")) or PureWindowsPath(value).is_absolute()
        return name_of(value) if absolute or (key == "reference" and is_local(value)) else value
    return value
