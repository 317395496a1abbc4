"""Markdown tables of the keys of a JSON schema: key, type, default, range, meaning."""

import json
from collections.abc import Iterable
from typing import Any

from distill.reference.json_schema import Node
from distill.reports.tables import markdown
from distill.schema import Written

TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "string": "text",
    "object": "mapping",
}
NOTHING = "none"
HEAD = ("key", "type", "default", "range", "meaning")


def key_table(schema: Node, names: Iterable[str], places: dict[str, str]) -> str:
    """A table of some of a schema's keys. places: for each definition the link to its section."""
    return markdown(HEAD, [_row(schema, name, places) for name in names])


def code(value: Any) -> str:
    """A value as written in a recipe, in code font."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _row(schema: Node, name: str, places: dict[str, str]) -> list[str]:
    node = schema["properties"][name]
    return [f"`{name}`", _type(node, places), _default(schema, name), _range(node), node.get("description", "")]


def _default(schema: Node, name: str) -> str:
    """The default of a key, or "required"."""
    node = schema["properties"][name]
    if name in schema.get("required", ()):
        return "required"
    if any(name in choice["required"] for choice in schema.get("anyOf", [])[:1]):
        others = " or ".join(code(key) for key in schema["anyOf"][1]["required"])
        return f"required without {others}"
    value = node.get("default")
    if isinstance(value, dict):
        return "the keys' own"
    return NOTHING if value is None else code(value)


def _type(node: Node, places: dict[str, str]) -> str:
    if "$ref" in node:
        return places[node["$ref"].rpartition("/")[2]]
    if "const" in node or "enum" in node:
        return _or([code(value) for value in node.get("enum", [node.get("const")])])
    if "anyOf" in node:
        return _any(node["anyOf"], places)
    if node.get("type") == "array":
        return _list(node, places)
    values = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
    for inner in filter(lambda value: isinstance(value, dict), values):
        keys = node.get("propertyNames", {}).get("enum")
        named = " from " + _or([code(key) for key in keys]) if keys else ""
        return f"mapping{named} to {_type(inner, places)}"
    return TYPES[node["type"]]


def _any(nodes: list[Node], places: dict[str, str]) -> str:
    """The type of a value with alternatives, without null. A count, whose alternatives are number and text, is "count"."""
    if {"type": "string", "pattern": Written.PATTERN} in nodes:
        return "count"
    found = dict.fromkeys(_type(node, places) for node in nodes if node.get("type") != "null")
    return _or(list(found))


def _list(node: Node, places: dict[str, str]) -> str:
    items = node.get("items", {})
    if isinstance(items, list):
        return f"list of {len(items)} {_type(items[0], places)}s"
    properties = items.get("properties")
    what = "stages" if properties and items.get("maxProperties") == 1 else _type(items, places)
    return f"list of {what}{'s' if what in TYPES.values() else ''}"


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _range(node: Node) -> str:
    """The range of a key's number, and of a list's length."""
    said = []
    for part in _parts(node):
        low, above = part.get("minimum"), part.get("exclusiveMinimum")
        high, below = part.get("maximum"), part.get("exclusiveMaximum")
        first = f"above {number(above)}" if above is not None else number(low) if low is not None else ""
        last = f"below {number(below)}" if below is not None else number(high) if high is not None else ""
        if first and last:
            said.append(f"{first} to {last}")
        elif first:
            said.append(f"{first} or more" if above is None else first)
        if part.get("minItems") and not isinstance(part.get("items"), list):
            said.append(f"at least {part['minItems']} of them")
        if "maxItems" in part and not isinstance(part.get("items"), list):
            said.append(f"at most {part['maxItems']} of them")
    return "; ".join(dict.fromkeys(said))


def _parts(node: Any) -> list[Node]:
    """A node and the nodes inside it, without references to other sections."""
    found = [node] if isinstance(node, dict) else []
    for inner in found and [node.get("items"), node.get("additionalProperties"), *node.get("anyOf", [])]:
        found += [] if not isinstance(inner, dict | list) else _parts(inner[0] if isinstance(inner, list) else inner)
    return found


def number(value: float) -> str:
    """Format a number for reading: 65,536, 0.001, 10^13."""
    whole = int(value)
    if whole != value:
        return f"{value:g}"
    zeros = len(str(whole)) - 1
    return f"10^{zeros}" if zeros > 8 and whole == 10**zeros else f"{whole:,}"
