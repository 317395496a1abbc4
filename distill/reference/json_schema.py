"""The JSON schema of recipes (draft 7, for editors), which `distill schema` prints and recipes/recipe.schema.json holds.

Stages, scorers and mixers come from their tables. Rules that a schema cannot express (a layout that does not fit the
teacher, options that exclude each other) are checked only by the loader.
"""

from inspect import getmodule
from types import UnionType
from typing import Any, get_args, get_origin

from distill.evaluation.questions import TASKS
from distill.evaluation.recall.families import FAMILIES
from distill.exporters import EXPORTERS
from distill.recipe import TRACKERS, Recipe
from distill.schema import Schema
from distill.selection import SCORERS, scorer_class
from distill.stages import STAGES, stage_class
from distill.stages.layouts import EVEN
from students.mixers import MIXERS, defaults_of, has_own_window, mixer_class, range_of
from students.mixers.mixer import Mixer
from students.mixers.windowed import Windowed

DRAFT = "http://json-schema.org/draft-07/schema#"
LETTERS = {"type": "string", "pattern": "^[A-Z]+$"}
PLAIN = {int: "integer", bool: "boolean", str: "string", type(None): "null"}
SSM, WINDOW = "ssm", "window"  # names among the definitions
Node = dict[str, Any]


def recipe_schema() -> Node:
    """The JSON schema of a recipe file."""
    made = schema_of(Recipe)
    definitions, keys = made.pop("definitions"), made["properties"]
    definitions |= _mixer_definitions() | _stage_definitions() | _scorer_definitions()
    keys["pattern"] |= _pattern([_reference(f"scorer.{name}") for name in SCORERS])
    mixers = {"anyOf": [_reference(f"mixer.{name}") for name in MIXERS]}
    keys["mixers"] |= {"propertyNames": {"pattern": "^[A-Z]$"}, "additionalProperties": mixers, "minProperties": 1}
    keys["stages"]["items"] = {
        "type": "object",
        "properties": {name: _with_null(definitions, f"stage.{name}") for name in STAGES},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    keys["export"]["items"], keys["trackers"]["items"] = ({"enum": list(names)} for names in (EXPORTERS, TRACKERS))
    places = [{"required": [key], "properties": {key: {"type": "string"}}} for key in ("path", "hub")]
    definitions["TextSource"]["oneOf"] = places
    made["required"] = [key for key in made["required"] if key not in ("name", "pattern", "mixers")]
    made["anyOf"] = [{"required": ["pattern", "mixers"]}, {"required": ["student"]}]
    return {"$schema": DRAFT, "title": "A recipe of distill"} | made | {"definitions": definitions}


def schema_of(model: type[Schema]) -> Node:
    """The JSON schema of one schema class, with the schemas that it refers to under `definitions`."""
    made = model.model_json_schema(ref_template="#/definitions/{model}")
    definitions = {name: _tidy(part) for name, part in made.pop("$defs", {}).items()}
    return _tidy(made) | {"definitions": definitions}


def said_of(documented: Any) -> str:
    """The docstring of a class or a module up to the first empty line."""
    return " ".join((documented.__doc__ or "").split("\n\n")[0].split())


def _mixer_definitions() -> dict[str, Node]:
    """The definitions of every mixer, of the window beside an SSM mixer, and of the values of the option `ssm`."""
    found = {f"mixer.{name}": _mixer(name) for name in MIXERS}
    window = Windowed.window_options
    options = {key: _option(Windowed, key, kind, Windowed.window_defaults.get(key)) for key, kind in window.items()}
    found[WINDOW] = _object("A window of attention beside an SSM mixer.", options, ["size"])
    found[SSM] = {"anyOf": [_reference(f"mixer.{name}") for name in MIXERS if not has_own_window(name)]}
    return found


def _mixer(name: str) -> Node:
    """The definition of a mixer: its options, including the window beside it."""
    kind, options = mixer_class(name), defaults_of(name)
    keys = {key: _option(kind, key, types, default) for key, (types, default) in options.items()}
    if not has_own_window(name):
        keys["window"] = {"description": "A window of attention beside the state.", **_reference(WINDOW), "default": None}
    return _object(said_of(getmodule(kind)), {"mixer": {"const": name, "description": "The mixer."}} | keys, ["mixer"])


def _option(kind: type[Mixer], key: str, types: Any, default: Any) -> Node:
    """The node of an option: its types, its range or choices, and its meaning."""
    if key in kind.choices:
        made: Node = {"enum": list(kind.choices[key])}
    else:
        parts = get_args(types) if get_origin(types) is UnionType else (types,)
        nodes = [_value(kind, key, part) for part in parts]
        made = nodes[0] if len(nodes) == 1 else {"anyOf": nodes}
    if key in kind.layer_options:
        by_layer = {"type": "object", "patternProperties": {"^([0-9]+|default)$": made}, "additionalProperties": False}
        made = {"anyOf": [*made.get("anyOf", [made]), by_layer]}
    default = {} if default is None and "null" not in str(made) else {"default": default}
    return {"description": kind.meanings.get(key, ""), **made, **default}


def _value(kind: type[Mixer], key: str, of_type: type) -> Node:
    """The node of a value of one type."""
    if of_type is dict:
        return _reference(SSM)
    if of_type is list:
        return {"type": "array", "items": {"type": "integer", "minimum": 0}}
    low, high = range_of(key, kind)
    return {"type": PLAIN[of_type]} | ({"minimum": low, "maximum": high} if of_type is int else {})


def _stage_definitions() -> dict[str, Node]:
    """The definitions of every stage, and of the schemas that these refer to."""
    found: dict[str, Node] = {}
    even: dict[str, Node] = {"by": {"const": EVEN}, "keep": {"type": "number", "minimum": 0}}
    choices = [_object("Layers evenly spread.", even, ["by", "keep"])]
    choices += [_reference(f"scorer.{name}") for name in SCORERS if not scorer_class(name).teacher_alone]
    for name in STAGES:
        kind = stage_class(name)
        made = schema_of(kind.Options)
        found |= made.pop("definitions")
        made["description"] = said_of(kind)
        if kind.changes_layout:
            made["properties"]["pattern"] |= _pattern([*choices, {"type": "null"}])
        if kind.text == "pairs":
            made["required"] = [*made.get("required", []), "data"]
        found[f"stage.{name}"] = made
    return found


def _scorer_definitions() -> dict[str, Node]:
    """The definitions of every scorer, and of the schemas that these refer to."""
    found: dict[str, Node] = {}
    for name in SCORERS:
        kind = scorer_class(name)
        made = schema_of(kind.Options)
        found |= made.pop("definitions")
        keys = made["properties"]
        keys["by"] |= {"const": name}
        for key, table in (("families", FAMILIES), ("names", TASKS)):
            if key in keys:
                keys[key]["items"] = {"enum": list(table)}
        found[f"scorer.{name}"] = made | {"description": said_of(kind)}
    return found


def _pattern(others: list[Node]) -> Node:
    """A layout as letters, or one of the other nodes."""
    return {"anyOf": [LETTERS, *others]}


def _reference(name: str) -> Node:
    return {"$ref": f"#/definitions/{name}"}


def _with_null(definitions: dict[str, Node], name: str) -> Node:
    """A stage's options; null (`- initialise:`) is valid too if all have defaults."""
    made = _reference(name)
    return made if definitions[name].get("required") else {"anyOf": [made, {"type": "null"}]}


def _object(description: str, keys: dict[str, Node], required: list[str]) -> Node:
    made = {"type": "object", "description": description, "properties": keys, "required": required}
    return made | {"additionalProperties": False}


def _tidy(node: Any, keys: bool = False) -> Any:
    """Remove pydantic's titles, join descriptions into one line, and write tuples as in draft 7. keys: the node maps names
    to schemas."""
    if isinstance(node, list):
        return [_tidy(part) for part in node]
    if not isinstance(node, dict):
        return node
    found = {name: _tidy(part, name == "properties" and not keys) for name, part in node.items() if keys or name != "title"}
    if not keys and isinstance(found.get("description"), str):
        found["description"] = " ".join(found["description"].split())
    if not keys and "prefixItems" in found:
        found["items"] = found.pop("prefixItems")
    return found
