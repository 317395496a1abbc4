"""A YAML file as plain entries, and overrides (`key.sub=value`) put into them; what they mean is `distill.recipe`'s."""

import re
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError, nearest


def read(path: Path) -> dict[str, Any]:
    """A file's entries.

    Raises:
        UserError: it cannot be read, is no text or no YAML, or holds something else than a mapping of named keys.
    """
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file (byte {error.start} is not UTF-8); a recipe is a YAML file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(entries, dict):
        found = "empty" if entries is None else f"a {type(entries).__name__}"
        raise UserError(f"{path} should be a mapping of keys, but is {found}")
    return entries


def override(entries: dict, given: str) -> None:
    """Put one `key.sub=value` into entries; lists are indexed (`stages.1.lr=1e-3`) or named (`stages.align.lr=1e-3`).

    Raises:
        UserError: it does not read like that, or names a place that the entries do not have.
    """
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise UserError(f"override {given!r} should read key.sub=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {given!r}: its value is not valid YAML: {error}") from error
    *path, last = _without_stage_names(entries, key.split("."))
    place = entries
    for part in path:
        place = _descend(place, part, given)
    if isinstance(place, list):
        place[_index(place, last, given)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(f"override {given!r}: {'.'.join(path)} is {place!r} and has no parts")


def _without_stage_names(entries: dict, parts: list[str]) -> list[str]:
    """`stages.1.align.lr`, as the YAML has it, as `stages.1.lr`: by its number a stage stands for its options."""
    listed = entries.get(parts[0])
    if len(parts) < 4 or not isinstance(listed, list) or parts[1] not in map(str, range(len(listed))):
        return parts
    entry = listed[int(parts[1])]
    named = isinstance(entry, dict) and list(entry) == [parts[2]] and isinstance(entry[parts[2]], dict)
    return [*parts[:2], *parts[3:]] if named else parts


def _descend(place, part: str, given: str):
    if isinstance(place, list):
        entry = place[_index(place, part, given)]
        options = list(entry.values()) if isinstance(entry, dict) else []
        return options[0] if len(options) == 1 and isinstance(options[0], dict) else entry  # a stage's options
    if not isinstance(place, dict):
        raise UserError(f"override {given!r}: {part!r} is below {place!r}, which has no parts")
    if place.get(part) is None:
        place[part] = {}
    return place[part]


def _index(entries: list, part: str, given: str) -> int:
    """A list's index by number, or by name where its entries are single-key mappings, as stages are."""
    names = [next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else None for entry in entries]
    if names.count(part) > 1:
        numbers = " or ".join(str(index) for index, name in enumerate(names) if name == part)
        raise UserError(
            f"override {given!r}: {part!r} stands {names.count(part)} times here; say which by its number, {numbers}"
        )
    if part in names:
        return names.index(part)
    if part in map(str, range(len(entries))):
        return int(part)
    known = [name for name in names if name] or range(len(entries))
    raise UserError(f"override {given!r}: there is no {part!r} here; {nearest(part, known)}")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; here it is the number that everyone means. A key that is no
    name or number, or given twice, is an error; a number becomes text, as it would in JSON."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            key = str(key) if type(key) is int else key
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)
