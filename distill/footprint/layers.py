"""Extrapolation of memory over depth: every layer of a kind adds the same amount, so models with one or two layers of each
kind suffice."""

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distill.build import empty
from students.config import Layout
from teachers.teacher import Teacher

Sizes = dict[str, float]
Deep = TypeVar("Deep", bound=Any)  # a `footprint.Shape`: it has a config, a family and a layout


def extrapolated(shape: Deep, measure: Callable[[Deep], Sizes]) -> Sizes:
    """The result of `measure` for a model, extrapolated from models with few of its layers if its layers are independent.

    The smallest model has two layers of each converted kind, because the first one may add less or more than the others:
    further ones add as much as the second.
    """
    kinds = _kinds(shape)
    few: list[int] = []
    counts = Counter(kinds)
    for kind in counts:
        layers = [layer for layer, other in enumerate(kinds) if other == kind]
        few += layers[: 2 if layers[0] in shape.layout.converted else 1]
    few.sort()
    missing = {kind: count - sum(kinds[layer] == kind for layer in few) for kind, count in counts.items()}
    runs = 1 + sum(count > 0 for count in missing.values())
    if not _independent(shape.layout) or runs * (len(few) + 1) >= len(kinds):
        return measure(shape)
    base = measure(_with(shape, few))
    found = dict(base)
    for kind, count in missing.items():
        if count:
            more = measure(_with(shape, sorted([*few, kinds.index(kind)])))
            found = {name: found[name] + count * (more[name] - base[name]) for name in found}
    return found


def _kinds(shape: Deep) -> list[tuple]:
    """The kind of each layer: its letter, whether it was converted last, its window and rotary embedding, and the shapes of
    its parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(shape.config))
    teacher = Teacher("", model, None, shape.family)
    student = empty(teacher, shape.layout)
    layers = cast(nn.ModuleList, student.get_submodule(shape.family.layers))
    held = [tuple((name, tuple(part.shape)) for name, part in layer.named_parameters()) for layer in layers]
    rules = [teacher.logit_rules(layer) for layer in range(teacher.n_layers)]
    newest = shape.layout.converted if shape.newest is None else shape.newest
    return [
        (letter, layer in newest, rule.window, rule.rope, parts)
        for layer, (letter, rule, parts) in enumerate(zip(shape.layout.pattern, rules, held, strict=True))
    ]


def _independent(layout: Layout) -> bool:
    """Whether no layer reads another's keys or parameters, and no option is given layer by layer."""

    def plain(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return True
        return not any(str(key).isdigit() or key in ("default", "share_kv") for key in value) and all(
            map(plain, value.values())
        )

    return all(len(group) == 1 for group in layout.groups) and all(plain(options) for options in layout.mixers.values())


def _with(shape: Deep, layers: list[int]) -> Deep:
    """The shape reduced to the given layers; a layer may occur twice."""
    depth, config = shape.config.num_hidden_layers, deepcopy(shape.config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, type(value)(value[layer] for layer in layers))
    config.num_hidden_layers = len(layers)
    pattern = "".join(shape.layout.pattern[layer] for layer in layers)
    used = {letter: options for letter, options in shape.layout.mixers.items() if letter in pattern}
    newest = None if shape.newest is None else tuple(n for n, layer in enumerate(layers) if layer in shape.newest)
    return replace(shape, config=config, layout=replace(shape.layout, pattern=pattern, mixers=used), newest=newest)
