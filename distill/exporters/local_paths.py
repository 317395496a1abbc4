"""What an export says of the machine that wrote it: nothing. Paths in its JSON files become the names that they end in."""

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

NAMED = re.compile(r"(.*_)?(name_or_path|file|path|folder|reference)")  # keys whose value may be a path
SMALL = 64 * 2**20  # bytes of a JSON file that is looked through; what is larger is a vocabulary


def name_of(reference: str) -> str:
    """A teacher's reference for others: of a folder or file of this machine its name alone, anything else as it is."""
    if not is_local(reference):
        return reference
    kind = PureWindowsPath if "\\" in reference else PurePosixPath
    return kind(reference.rstrip("/\\")).name or "local"


def is_local(reference: str) -> bool:
    """Whether a reference leads to a place of this machine, here or once."""
    if reference.startswith("package:"):
        return False
    if reference.startswith((".", "/", "~")) or PureWindowsPath(reference).is_absolute() or reference.count("/") > 1:
        return True
    try:
        return Path(reference).exists()
    except (OSError, ValueError):
        return False


def take_out(folder: Path) -> None:
    """Replace the paths in the JSON files of a folder, in place.

    Raises:
        OSError: a file cannot be written. ValueError: one is no JSON.
    """
    for file in sorted(folder.glob("*.json")):
        if file.stat().st_size > SMALL or file.name in ("tokenizer.json", "vocab.json"):
            continue
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
