"""Values that a file or a command line may hold and should not: numbers beyond every range, names that are paths, code or
markup, structures without end. A value that JSON cannot hold is written {"$value": kind, ...}; `real` makes it."""

import json

from hypothesis import strategies as st

MARK = "<img src=x onerror=alert(1)>"  # in a page it must be escaped
ESCAPE = "\x1b[31mred\x1b]0;title\x07"
CODE = "__import__('os').close(open('outside/executed','w').fileno())"

NUMBERS = [
    *(0, -1, 1, 2, 3, 7, 8, 63, 255, 257, 1000, 65_537, 10**6, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64),
    *(10**8, 10**12, 10**30, -(2**63), -(10**12)),
    *(0.5, -0.5, 1.5, 1e-30, 1e300, -1e300, 1e-320, 0.1),
    *({"$value": "float", "of": name} for name in ("nan", "inf", "-inf", "-0.0")),
    {"$value": "power", "of": 5000},
]
STRINGS = [
    *("", " ", "\n", "\t", ".", "..", "~", "-", "0", "-1", "1e3", "nan", "inf", "null", "true", "{}", "[]", "%s", "{0}"),
    *("\0", "a\0b", ESCAPE, MARK, "[bold]x[/bold]", "[/]", "[red", "[link=file:///etc/passwd]x[/link]", "&amp;", "a: b"),
    *("../outside/secret.txt", "outside/secret.txt", "/etc/passwd", "outside/folder", "../../outside", "a/b", "/", "./"),
    *("\u202eright to left", "é\u0301", "\ufeffbom", "\U0001f600", "ß" * 200, "x" * 5000, "AM", "M", "A", "cpu", "cuda"),
    *(
        "C:\\x",
        "file:///etc/passwd",
        "package:",
        "package:os/x.gguf",
        "hub/name",
        "*",
        "**/*",
        "[a-z]",
        "shipped:",
        "shipped:../README.md",
    ),
    {"$value": "surrogate"},
    {"$value": "long", "of": "a", "times": 300_000},
]
STRUCTURES = [
    *(
        None,
        True,
        False,
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"a": 1},
        ["a"],
        [1, 2, 3],
        [True],
        [{}],
        {"0": 0},
        {"$value": "deep", "times": 400},
    ),
    {"$value": "deep", "times": 5000},
    {"$value": "deepmap", "times": 3000},
    {"$value": "many", "times": 100_000},
]

numbers = st.sampled_from(NUMBERS) | st.integers(-(2**40), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
strings = st.sampled_from(STRINGS) | st.text(max_size=8)
structures = st.sampled_from(STRUCTURES) | st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3).filter(lambda key: key != "$value"), inner, max_size=3)
    ),
    max_leaves=5,
)
values = numbers | strings | structures


def real(value):
    """A value as it is meant."""
    if isinstance(value, dict) and "$value" in value:
        kind = value["$value"]
        if kind == "float":
            return float(value["of"])
        if kind == "power":
            return 10 ** value["of"]
        if kind == "surrogate":
            return "\ud800"
        if kind == "long":
            return value["of"] * value["times"]
        if kind == "many":
            return list(range(value["times"]))
        made = 1
        for _ in range(value["times"]):
            made = {"a": made} if kind == "deepmap" else [made]
        return made
    if isinstance(value, dict):
        return {key: real(entry) for key, entry in value.items()}
    return [real(entry) for entry in value] if isinstance(value, list) else value


def as_json(value, yaml: bool = False) -> str:
    """A value as JSON, however deep it is: `json.dumps` gives up at a thousand, and readers of files should not have to.
    yaml: with YAML's words for numbers that are none."""
    kind = value.get("$value") if isinstance(value, dict) else None
    if kind in ("deep", "deepmap"):
        left, right = ("[", "]") if kind == "deep" else ('{"a": ', "}")
        return left * value["times"] + "1" + right * value["times"]
    if kind == "power":
        return "1" + "0" * value["of"]
    if kind == "float" and yaml:
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(value["of"], value["of"])
    if isinstance(value, dict) and kind is None:
        return "{" + ", ".join(f"{json.dumps(str(key))}: {as_json(entry, yaml)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_json(entry, yaml) for entry in value) + "]"
    return json.dumps(real(value))
