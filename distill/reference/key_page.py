"""The generated part of docs/recipe-reference.md: every key of a recipe, section by section."""

from collections.abc import Iterator
from inspect import get_annotations

from distill.recipe import Checkpoints, Data, EvaluationOptions, Selected, TextSource
from distill.reference.json_schema import SSM, WINDOW, Node, recipe_schema, schema_of
from distill.reference.tables import key_table
from distill.schema import Schema
from distill.selection import SCORERS, scorer_class
from distill.selection.options import Options
from distill.stages import STAGES, stage_class
from distill.stages.layouts import Further
from distill.stages.stage import StageOptions, TrainingOptions
from distill.stages.whole import Lora, TaughtOptions, WholeOptions
from students.mixers import MIXERS

OPEN: dict[type[Schema], str] = {  # parts of a recipe with a section of their own, and its heading
    Data: "The key data",
    TextSource: "A source of text",
    EvaluationOptions: "The key evaluation",
    Checkpoints: "The key checkpoints",
    Selected: "The key selected",
    Lora: "The key lora",
}
SHARED: dict[type[Schema], str] = {  # base schemas of several stages, and the heading of their section
    StageOptions: "Every stage",
    TrainingOptions: "Every stage that trains",
    WholeOptions: "Every stage that trains the student end to end",
    TaughtOptions: "Every stage that learns from a teacher's distributions",
    Further: "Every stage that converts further layers",
}


def key_page() -> str:
    """The page after its introduction."""
    schema = recipe_schema()
    places = _places()
    lines = ["## The recipe", "", schema["description"], "", key_table(schema, schema["properties"], places)]
    for kind, heading in OPEN.items():
        if kind is not Lora:
            lines += _section(f"## {heading}", schema["definitions"][kind.__name__], places)
    return "\n".join([*lines, *_layouts(schema, places), *_mixers(schema, places), *_stages(schema, places)])


def _section(heading: str, node: Node, places: dict[str, str], names: list[str] | None = None, more: str = "") -> list[str]:
    """A section: the heading, the schema's description, and the table of its keys."""
    keys = list(node["properties"]) if names is None else names
    said = " ".join(filter(None, (node["description"], more)))
    return ["", heading, "", said, *(["", key_table(node, keys, places)] if keys else [])]


def _layouts(schema: Node, places: dict[str, str]) -> Iterator[str]:
    yield from ("", "## The key pattern as a mapping", "")
    yield "A mapping under `pattern` names a scorer (`by`) and how much attention is kept (`keep`)."
    common = schema["definitions"][f"scorer.{next(iter(SCORERS))}"]
    node = common | {"description": "These keys are the same for every scorer."}
    by = {"by": {"description": Options.model_fields["by"].description, "enum": [*SCORERS]}}
    node["properties"] = node["properties"] | by
    yield from _section("### Every scorer", node, places)
    for name in SCORERS:
        own = _own(scorer_class(name).Options, Options)
        node = schema["definitions"][f"scorer.{name}"]
        yield from _section(f"### Scorer `{name}`", node, places, own)


def _mixers(schema: Node, places: dict[str, str]) -> Iterator[str]:
    yield from ("", "## The key mixers", "")
    yield "Each letter of `pattern` but `A` has a mixer by name, with its options: `M: {mixer: mamba2, expand: 1}`."
    for name in MIXERS:
        yield from _section(f"### Mixer `{name}`", schema["definitions"][f"mixer.{name}"], places)
    yield from _section("### The window beside a mixer", schema["definitions"][WINDOW], places)


def _stages(schema: Node, places: dict[str, str]) -> Iterator[str]:
    yield from ("", "## The key stages", "")
    yield "A list of stages in the order in which they run. Each entry is one stage with its keys."
    for base, heading in SHARED.items():
        node = schema_of(base)
        if base is Further:  # its `pattern` is described in the stages that convert layers
            changing = next(name for name in STAGES if stage_class(name).changes_layout)
            node["properties"] |= {"pattern": schema["definitions"][f"stage.{changing}"]["properties"]["pattern"]}
        yield from _section(f"### {heading}", node, places, _fields(base))
    yield from _section(f"### {OPEN[Lora]}", schema["definitions"][Lora.__name__], places)
    for name in STAGES:
        options = stage_class(name).Options
        bases = [base for base in options.__mro__ if base in SHARED]
        linked = [f"[{SHARED[base][0].lower()}{SHARED[base][1:]}]({_anchor(SHARED[base])})" for base in reversed(bases)]
        own = _own(options, *bases)
        more = f"It takes the keys of {', '.join(linked)}{', and its own.' if own else '.'}"
        yield from _section(f"### Stage `{name}`", schema["definitions"][f"stage.{name}"], places, own, more)


def _own(options: type[Schema], *shared: type[Schema]) -> list[str]:
    """The keys that a schema declares or overrides, without those of the shared schemas."""
    declared = {key for kind in options.__mro__ if kind not in shared and issubclass(kind, Schema) for key in _fields(kind)}
    return [key for key in options.model_fields if key in declared]


def _fields(kind: type[Schema]) -> list[str]:
    """The keys that a class itself declares."""
    return [name for name in get_annotations(kind) if name in kind.model_fields]


def _anchor(heading: str) -> str:
    """The link to a heading of the page."""
    return "#" + heading.lower().replace("`", "").replace(",", "").replace("'", "").replace(" ", "-")


def _places() -> dict[str, str]:
    """The links to the sections of the definitions, by name."""
    found = {kind.__name__: f"[{_short(heading)}]({_anchor(heading)})" for kind, heading in OPEN.items()}
    found |= {f"mixer.{name}": f"[mixer]({_anchor('The key mixers')})" for name in MIXERS}
    found |= {f"scorer.{name}": f"[mapping]({_anchor('The key pattern as a mapping')})" for name in SCORERS}
    found |= {f"stage.{name}": "stage" for name in STAGES}
    return found | {
        SSM: f"[mixer]({_anchor('The key mixers')})",
        WINDOW: f"[mapping]({_anchor('The window beside a mixer')})",
    }


def _short(heading: str) -> str:
    return "source of text" if heading == OPEN[TextSource] else "mapping"
