"""Switched models: each layer or head can be the teacher's attention or its stand-in, and is switched without copying.

A model is made once. All weights are the teacher's own, in shared memory, so two measurements differ only in the switches.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.build import build, empty, layout_of
from distill.errors import UserError
from distill.evaluation.baselines import UNTRAINED
from distill.recipe import Recipe
from distill.runs.session import Session
from distill.selection.options import Options, rest_of
from distill.stages import stages_of
from students.config import KEEP, Layout
from students.skeleton import Student
from teachers.teacher import Teacher

STAND_IN = "S"


class Switch(nn.Module):
    """A layer's attention and its stand-in in one slot.

    gate: 1 for attention, 0 for the stand-in, or a tensor that mixes them: gate x attention + (1 - gate) x stand-in."""

    def __init__(self, attention: nn.Module, stand_in: nn.Module) -> None:
        super().__init__()
        self.attention, self.stand_in = attention, stand_in
        self.gate: float | Float[Tensor, ""] = 1.0

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Float[Tensor, "b t d"], None]:
        """The output for the slot's layer, and None in place of attention weights."""
        if not isinstance(self.gate, Tensor):
            return (self.attention if self.gate else self.stand_in)(*inputs, **keywords)[0], None
        kept, other = (branch(*inputs, **keywords)[0] for branch in (self.attention, self.stand_in))
        gate = self.gate.to(kept.dtype)
        return gate * kept + (1 - gate) * other, None


class Switched:
    """A model with a switch in every layer."""

    def __init__(self, teacher: Teacher, student: Student) -> None:
        """student: has a stand-in in every layer; it becomes the model."""
        self.model = student
        place, kept = student.place, build(teacher, Layout(KEEP * teacher.n_layers))[0]
        layers, attentions = (cast(nn.ModuleList, model.get_submodule(place.layers)) for model in (student, kept))
        self.switches: list[Switch] = []
        for layer, attention in zip(layers, attentions, strict=True):
            self.switches.append(Switch(getattr(attention, place.name), getattr(layer, place.name)))
            setattr(layer, place.name, self.switches[-1])
        self.model.requires_grad_(False).eval()

    def keep(self, layers: Iterable[int]) -> Student:
        """The model with attention in these layers and stand-ins in the others."""
        kept = set(layers)
        for layer, switch in enumerate(self.switches):
            switch.gate = float(layer in kept)
        return self.model

    def mix(self, gates: Sequence[Float[Tensor, ""]]) -> Student:
        """The model with these gates, one for each layer."""
        for switch, gate in zip(self.switches, gates, strict=True):
            switch.gate = gate
        return self.model


def make_switched(session: Session, options: Options) -> Switched:
    """The teacher with a switch in every layer, with stand-ins as the options say.

    Raises:
        UserError: stand_in is "mixer", and the recipe's mixers cannot be switched layer by layer.
    """
    teacher, recipe = session.teacher, session.recipe
    if options.stand_in == "window":
        layout = Layout(STAND_IN * teacher.n_layers, {STAND_IN: untrained(options)})
        return Switched(teacher, build(teacher, layout)[0])
    student, transfers = build(teacher, _mixers_everywhere(recipe, options, teacher.n_layers))
    stages_of(recipe)[0].make(teacher, student, transfers).begin(session.calibration(0))
    return Switched(teacher, student)


def check_stand_in(recipe: Recipe, options: Options, teacher: Teacher) -> None:
    """Refuse impossible stand-ins. The teacher's weights may be on the meta device.

    Raises:
        UserError: as `make_switched`; also where a mixer refuses its options.
    """
    if options.stand_in == "mixer":
        empty(teacher, _mixers_everywhere(recipe, options, teacher.n_layers))


def _mixers_everywhere(recipe: Recipe, options: Options, layers: int) -> Layout:
    """A layout with the recipe's own mixers in every layer."""
    rest = (rest_of(recipe, options) * layers)[:layers]
    layout = layout_of(rest, {name: recipe.mixers[name] for name in set(rest)}, layers, recipe.name)
    if any(options.get("share_kv") for options in layout.mixers.values()):
        raise UserError(
            f"{recipe.name}: pattern.stand_in is 'mixer', but a mixer shares another layer's keys and values, which "
            "would be missing where that layer keeps its attention; use stand_in: window"
        )
    return layout


def untrained(options: Options) -> dict:
    """The mixer and options of the window that stands in for a layer's attention."""
    return {**UNTRAINED, "window": options.window, "sinks": options.sinks}


def _mixer(slot: nn.Module) -> Any:
    """The attention in a slot: a mixer with `scale` and `o_proj`."""
    return slot.mixer


class HeadSwitch(nn.Module):
    """A layer's attention with a switch for each head.

    Heads that are switched off see the window, if there is one, else they output zero. `scale` of both branches holds the
    switches, and the shared output bias is counted once.
    """

    def __init__(self, attention: nn.Module, window: nn.Module | None) -> None:
        super().__init__()
        self.attention, self.window = attention, window

    @torch.no_grad()
    def keep(self, heads: Iterable[int]) -> None:
        """Switch these heads on, the others off."""
        scale = _mixer(self.attention).scale
        scale.zero_()[list(heads)] = 1.0
        if self.window is not None:
            _mixer(self.window).scale.copy_(1.0 - scale)

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Float[Tensor, "b t d"], None]:
        """As `Switch.forward`."""
        out = self.attention(*inputs, **keywords)[0]
        if self.window is None or not bool(_mixer(self.window).scale.any()):
            return out, None
        bias = _mixer(self.window).o_proj.bias
        other = self.window(*inputs, **keywords)[0]
        return out + other - (0 if bias is None else bias.to(out.dtype)), None


class SwitchedHeads:
    """A model with a switch for every head."""

    def __init__(self, teacher: Teacher, options: Options, windows: bool) -> None:
        """windows: whether heads that are switched off see a window; if not, they output zero."""
        whole = Layout(STAND_IN * teacher.n_layers, {STAND_IN: {"mixer": "attention"}})
        self.model = build(teacher, whole)[0]
        place = self.model.place
        self.counts: list[int] = [cast(Any, mixer).n_heads for mixer in self.model.mixers.values()]
        seeing: nn.ModuleList | None = None
        if windows:
            other = build(teacher, Layout(whole.pattern, {STAND_IN: untrained(options)}))[0]
            seeing = cast(nn.ModuleList, other.get_submodule(place.layers))
        self.switches: list[HeadSwitch] = []
        for index, layer in enumerate(cast(nn.ModuleList, self.model.get_submodule(place.layers))):
            window = None if seeing is None else getattr(seeing[index], place.name)
            self.switches.append(HeadSwitch(getattr(layer, place.name), window))
            setattr(layer, place.name, self.switches[-1])
        self.model.requires_grad_(False).eval()

    def keep(self, heads: Mapping[int, Iterable[int]]) -> Student:
        """The model with only these heads on in these layers; layers that are not named keep all heads."""
        for layer, switch in enumerate(self.switches):
            switch.keep(heads.get(layer, range(self.counts[layer])))
        return self.model
