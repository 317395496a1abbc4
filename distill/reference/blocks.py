"""The generated parts of pages, by name in BLOCKS. Their links are relative to the root of the project."""

from collections.abc import Callable, Mapping
from inspect import getmodule
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from distill.benchmarks.layouts import LAYOUTS, RECIPE, of_layout
from distill.build import empty, layout_of
from distill.exporters import EXPORTERS, target
from distill.recipe_file import load
from distill.reference.json_schema import recipe_schema, said_of
from distill.reference.key_page import key_page
from distill.reference.published import PUBLISHED
from distill.reference.systems import SYSTEMS, System, layers
from distill.reference.tables import code, key_table
from distill.reports.tables import markdown
from distill.schema import MULTIPLES
from distill.selection import SCORERS, scorer_class
from distill.shipped import list_recipes, shipped_folder
from distill.stages import STAGES, stage_class, stages_of
from distill.yaml_file import dump
from students.mixers import MIXERS, defaults_of, has_own_window, mixer_class
from students.state_size import state_bytes
from teachers.families import FAMILIES, family_of
from teachers.teacher import Teacher

SMALL = "smollm2-135m-instruct"  # the teacher's config in the tables of layouts and scorers
SHORT, LONG, LONGEST = 2**10, 2**15, 2**18  # context lengths in tokens
KEPT = 8  # layers of the small teacher that the scorers keep
PAGE = "docs/recipe-reference.md"


def recipes() -> str:
    """The table of the shipped recipes."""
    rows = []
    for row in list_recipes():
        entries = stages_of(load(row["recipe"]))
        tokens, stages = sum(entry.options.tokens for entry in entries), [entry.name for entry in entries]
        rows.append(
            [code(row["recipe"]), code(row["teacher"].rpartition("/")[2]), row["what"], _count(tokens), ", ".join(stages)]
        )
    return markdown(("recipe", "teacher", "what it is", "tokens", "stages"), rows)


def recipe_keys() -> str:
    """The table of a recipe's top-level keys."""
    schema = recipe_schema()
    places = dict.fromkeys(schema["definitions"], f"[mapping]({PAGE})")
    return key_table(schema, schema["properties"], places)


def stages() -> str:
    """The table of stages."""
    return markdown(("stage", "what it does"), [[_linked("stage", name), said_of(stage_class(name))] for name in STAGES])


def scorers() -> str:
    """The table of scorers, with their cost on the small teacher."""
    config = _config(SMALL)
    rows = []
    for name in SCORERS:
        kind = scorer_class(name)
        options = kind.Options.model_validate({"by": name, "keep": KEPT} | ({"tasks": "tasks"} if name == "task" else {}))
        measured = kind.passes(options, config.num_hidden_layers, config.num_attention_heads)
        trained = kind.trains_on(options)
        cost = f"{measured:,}" + (f", and {_count(trained)} tokens of training" if trained else "")
        rows.append([_linked("scorer", name), said_of(kind), cost])
    return markdown(("scorer", "what is kept", "models measured"), rows)


def mixers() -> str:
    """The table of mixers and their options."""
    rows = []
    for name in MIXERS:
        kind = mixer_class(name)
        oriented = "as its SSM" if "ssm" in defaults_of(name) else "yes" if kind.orientable else "no"
        options = [code(key) for key in (*defaults_of(name), *(() if has_own_window(name) else ("window",)))]
        rows.append([_linked("mixer", name), said_of(getmodule(kind)), oriented, ", ".join(options)])
    return markdown(("mixer", "what it is", "`orient` fits it", "options"), rows)


def systems() -> str:
    """The table of published systems whose layouts a student can have."""
    return markdown(
        ("system", "paper (arXiv)", "what is as published", "layers of the first recipe", "recipes"),
        [[name, ", ".join(system.papers), system.covered, *_layers_and_recipes(system)] for name, system in SYSTEMS.items()],
    )


def _layers_and_recipes(system: System) -> tuple[str, str]:
    """The layers of a system's first recipe, and its recipes; the mixers of its layouts if it has no recipe."""
    if system.recipes:
        return layers(system.recipes[0]), ", ".join(map(code, system.recipes))
    written = [_written(LAYOUTS[name][1]) for name in system.layouts]
    return "", f"none; `mixers` is {' or '.join(written)} in [the benchmark](docs/students.md#the-size-of-a-layout)"


def configs() -> str:
    """The table of shipped configs of published checkpoints."""
    rows = []
    for name, published in PUBLISHED.items():
        kind = _config(name).model_type
        family = ", ".join(filter(None, (kind, published.note)))
        rows.append([code(name), code(published.place), family, f"{published.parameters:,}"])
    return markdown(("config", "published at", "family (`model_type`)", "parameters"), rows)


def targets() -> str:
    """The table of export targets."""
    return markdown(("target", "what it writes"), [[code(name), target(name).line] for name in EXPORTERS])


def families() -> str:
    """The table of the teachers' families."""
    rows = []
    for name, family in FAMILIES.items():
        refused = [f"`{key}: {str(value).lower()}` is refused: {why}" for key, value, why in family.refused]
        rows.append([code(name), family.examples, "; ".join(filter(None, [family.note, *refused]))])
    return markdown(("`model_type`", "published models", "what to know"), rows)


def layouts() -> str:
    """The table of the layouts of `distill bench layouts`: MiB of one sequence's cache, and parameters of the mixers."""
    head = ("layout", "pattern", "mixers", "MiB at 1k", "32k", "256k", "parameters, M")
    return markdown(head, [layout_row(name) for name in LAYOUTS])


def layout_row(name: str) -> list[str]:
    """The cells of one layout."""
    recipe, teacher = of_layout(load(RECIPE), name), _small_teacher()
    pattern = str(recipe.pattern)  # the benchmark's layouts are all written out
    student = empty(teacher, layout_of(pattern, recipe.mixers, teacher.n_layers, name, recipe.meta_tokens))
    short, long = (state_bytes(student, tokens) for tokens in (SHORT, LONG))
    longest = long + (long - short) * (LONGEST - LONG) // (LONG - SHORT)  # every token adds the same
    sizes = [f"{size / 2**20:.1f}" for size in (short, long, longest)]
    count = sum(parameter.numel() for mixer in _mixers_of(student) for parameter in mixer.parameters())
    extra = f", `meta_tokens: {recipe.meta_tokens}`" if recipe.meta_tokens else ""
    return [name, f"`{pattern}`", f"{_written(recipe.mixers)}{extra}", *sizes, f"{count / 1e6:.1f}"]


BLOCKS: dict[str, Callable[[], str]] = {
    "keys": key_page,
    "recipe keys": recipe_keys,
    "recipes": recipes,
    "stages": stages,
    "scorers": scorers,
    "mixers": mixers,
    "systems": systems,
    "configs": configs,
    "targets": targets,
    "families": families,
    "layouts": layouts,
}


def _config(name: str) -> PretrainedConfig:
    """A shipped config."""
    return AutoConfig.from_pretrained(shipped_folder() / "configs" / f"{name}.json")


def _mixers_of(student: nn.Module) -> list[nn.Module]:
    return list(cast("dict[int, nn.Module]", student.mixers).values())


def _written(mixers: Mapping[str, dict]) -> str:
    """A recipe's `mixers` on one line."""
    line = dump(dict(mixers), default_flow_style=True, width=10**6).strip()
    return code(line.removeprefix("{").removesuffix("}"))


def _linked(kind: str, name: str) -> str:
    return f"[`{name}`]({PAGE}#{kind}-{name})"


def _count(tokens: int) -> str:
    """Format a count with at most three digits: 24k, 2.8B."""
    letter, size = next(pair for pair in reversed(MULTIPLES.items()) if tokens >= pair[1])
    return f"{tokens / size:.3g}{letter}"


def _small_teacher() -> Teacher:
    """A teacher without weights, on the meta device."""
    config = _config(SMALL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return Teacher(SMALL, model, None, family_of(config, SMALL))
