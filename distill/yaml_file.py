"""Strict reading of YAML files into plain entries, and overrides (`key.sub=value`) of these entries.

Values that YAML 1.1 and 1.2 read differently (`010`, `1:30`, `yes`) and features that no recipe needs (tags, `<<`) are
refused, with a message that names them.
"""

import math
import re
from pathlib import Path
from typing import Any, cast

import yaml

from distill.errors import UserError, nearest, printable
from distill.reading import MOST_DIGITS, read_text

MOST_BYTES = 256 * 2**10  # of a recipe; the longest shipped one has 6 KiB
MOST_DEPTH = 24  # of nested lists and mappings
MOST_ENTRIES = 20_000  # after every alias is expanded
CUT = 200  # characters that are kept of the YAML parser's message
OLD = (  # plain values that YAML 1.1 and 1.2 read differently: how, and what to write instead
    (r"[-+]?0[0-9_]+", "in base 8 by YAML 1.1 and in base 10 by YAML 1.2; write it without the leading zero"),
    (r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?", "in base 60 by YAML 1.1 and as text by YAML 1.2; write the number"),
    ("yes|Yes|YES|on|On|ON", "as true by YAML 1.1 and as text by YAML 1.2; write true"),
    ("no|No|NO|off|Off|OFF", "as false by YAML 1.1 and as text by YAML 1.2; write false"),
)
TEXT_TAGS = (None, "!", "tag:yaml.org,2002:str")  # the only tags that may be written out


def read(path: Path) -> dict[str, Any]:
    """Read a file's entries.

    Raises:
        UserError: it cannot be read, is not text or not YAML, is too large, or is not a mapping of named keys.
    """
    try:
        text = read_text(path, most=MOST_BYTES, fix="a recipe is a small YAML file")
    except UserError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            start = error.__cause__.start
            raise UserError(f"{path} is not a text file (byte {start} is not UTF-8); a recipe is a YAML file") from error
        raise
    entries = _load(text, f"{path} is not valid YAML")
    if not isinstance(entries, dict):
        found = "empty" if entries is None else f"a {type(entries).__name__}"
        raise UserError(f"{path} should be a mapping of keys, but is {found}")
    return entries


def _load(text: str, where: str) -> Any:
    """Parse YAML text.

    Raises:
        UserError: it is not valid YAML; the message is one line that begins with `where`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        parts = [part for part in (error.context, error.problem) if part]
        raise UserError(f"{where}: {_short(', '.join(parts) or 'it cannot be parsed')}{place}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {_short(str(error))}") from error
    except (RecursionError, ValueError, OverflowError, KeyError, AttributeError, TypeError) as error:  # odd scalars
        raise UserError(f"{where}: {_short(str(error) or type(error).__name__)}") from error


def _short(said: str) -> str:
    return printable(" ".join(said.split()))[:CUT]


def override(entries: dict, given: str) -> None:
    """Apply one override, `key.sub=value`. Entries of lists are addressed by index (`stages.1.lr=1e-3`) or by name
    (`stages.align.lr=1e-3`).

    Raises:
        UserError: it has another form, or names a place that the entries do not have.
    """
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise UserError(f"override {given!r} should read key.sub=value")
    value = _load(text, f"override {given!r}: its value is not valid YAML")
    *path, last = _without_stage_names(entries, key.split("."))
    place = entries
    for part in path:
        place = _descend(place, part, given)
    if isinstance(place, list):
        place[_index(place, last, given)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        where = ".".join(path)
        raise UserError(f"override {given!r}: {where} is {place!r} and has no parts{_whole_pattern(where, last, value)}")


def _whole_pattern(where: str, key: str, value: Any) -> str:
    """How to write an override of a part of a pattern that is a text of letters; empty for other keys."""
    if where.rpartition(".")[2] != "pattern":
        return ""
    mapping = {"keep": 0.25, "by": "recall"} | ({key: value} if key in ("keep", "by") else {})
    written = dump(mapping, default_flow_style=True, width=math.inf).strip()
    return f"; write the whole pattern, {where}='{written}' or {where}=MMMA"


def _without_stage_names(entries: dict, parts: list[str]) -> list[str]:
    """Shorten `stages.1.align.lr`, the path in the YAML, to `stages.1.lr`."""
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
        return options[0] if len(options) == 1 and isinstance(options[0], dict) else entry  # of a stage its options
    if not isinstance(place, dict):
        raise UserError(f"override {given!r}: {part!r} is below {place!r}, which has no parts")
    if place.get(part) is None:
        place[part] = {}
    return place[part]


def _index(entries: list, part: str, given: str) -> int:
    """The index of a list's entry, given by number, or by name if the entries are single-key mappings, as stages are."""
    names = [next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else None for entry in entries]
    if names.count(part) > 1:
        numbers = " or ".join(str(index) for index, name in enumerate(names) if name == part)
        raise UserError(f"override {given!r}: {part!r} occurs {names.count(part)} times here; give the number, {numbers}")
    if part in names:
        return names.index(part)
    if part in map(str, range(len(entries))):
        return int(part)
    known = [name for name in names if name] or range(len(entries))
    raise UserError(f"override {given!r}: there is no {part!r} here; {nearest(part, known)}")


class _Loader(yaml.SafeLoader):
    """A bounded YAML loader. 1e-3 is a number (YAML 1.1 reads text), and a date is text.

    A key that is neither a name nor a number, or that is given twice, is an error. A number as a key becomes text, as in
    JSON."""

    def __init__(self, stream) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by a node's id its number of entries, with aliases expanded

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.NodeEvent) and not isinstance(event, yaml.AliasEvent):
            self._check_tag(event)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested deeper than {MOST_DEPTH}", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._count(cast(yaml.Node, node), event)
        return node

    def compose_scalar_node(self, anchor):
        event = self.peek_event()
        node = super().compose_scalar_node(anchor)
        if event.style is None and event.tag is None:
            self._check_plain(node)
        return node

    def _check_tag(self, event: Any) -> None:
        collection = isinstance(event, yaml.CollectionStartEvent)
        if event.tag not in ((None, "!") if collection else TEXT_TAGS):
            said = f"the tag {event.tag.replace('tag:yaml.org,2002:', '!!')!r} is not supported; leave it out"
            raise yaml.constructor.ConstructorError(None, None, said, event.start_mark)

    def _check_plain(self, node: yaml.ScalarNode) -> None:
        """Refuse an unquoted value that YAML 1.1 and 1.2 read differently."""
        value, mark = node.value, node.start_mark
        if value == "<<":
            raise yaml.constructor.ConstructorError(
                None, None, "merge keys (<<) are not supported; write the keys out", mark
            )
        for pattern, meaning in OLD:
            if re.fullmatch(pattern, value):
                said = f"{value} is read {meaning}, or '{value}' in quotes for text"
                raise yaml.constructor.ConstructorError(None, None, said, mark)
        digits, kind = value.lstrip("+-").replace("_", ""), node.tag.rpartition(":")[2]
        long = kind == "int" and len(digits) > MOST_DIGITS
        if long or (kind == "float" and digits[-1].isdigit() and math.isinf(float(digits))):
            said = f"the number {digits[:8]}{'...' * long} is too large"
            raise yaml.constructor.ConstructorError(None, None, said, mark)

    def _count(self, node: yaml.Node, event: yaml.Event) -> None:
        """Refuse aliases that expand to more than MOST_ENTRIES entries, and aliases inside the node that they name."""
        if id(node) in self._sizes:
            return
        if isinstance(event, yaml.AliasEvent):  # of a node that is still being read
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is used inside the node that it names", cast(Any, event.start_mark)
            )
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        size = 1 + sum(self._sizes[id(part)] for part in parts)
        if size > MOST_ENTRIES:
            said = f"it holds more than {MOST_ENTRIES:,} entries when its aliases are expanded"
            raise yaml.composer.ComposerError(None, None, said, node.start_mark)
        self._sizes[id(node)] = size

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            key = str(key) if type(key) is int else key
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


class _Dumper(yaml.SafeDumper):
    """A dumper of YAML that `_Loader` reads: text is quoted if YAML 1.1 or 1.2 would read it as another type."""


OLD_TAGS = ("bool", "int", "float", "timestamp", "value", "merge")  # of YAML 1.1
NEW_TAGS = (  # the core schema of YAML 1.2, with 0b, 1_000 and without 0o; by their first letters
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
)  # fmt: skip
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in OLD_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in NEW_TAGS:
    for _reader in (_Loader, _Dumper):
        _reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
for _pattern, _ in OLD:
    _Dumper.add_implicit_resolver("!old", re.compile(f"^(?:{_pattern})$"), None)


def dump(entries: Any, **options: Any) -> str:
    """Format entries as YAML that `read` returns unchanged. options: of PyYAML's `dump`."""
    return yaml.dump(entries, Dumper=_Dumper, **{"sort_keys": False, **options})
