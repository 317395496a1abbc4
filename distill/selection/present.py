"""Selection on the current student: which of its remaining attention layers stay, for stages that convert further ones.

The scorer sees only the layers with attention, numbered from 0. Layers that are converted already do not change in any
model that it measures. The stand-in of a layer is made from the student's current attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

from rich.console import Console
from torch import nn

from distill.build import as_source, attention_shapes, further_mixers
from distill.errors import UserError
from distill.mixed_types import join_types
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection.checking import replacing_options
from distill.selection.measurer import Measurer, Records
from distill.selection.options import Options
from distill.selection.resolution import chosen_by, chosen_once
from distill.selection.switched import STAND_IN, Switch, Switched, untrained
from distill.stages import StageEntry, key_of
from distill.stages.initialise import Initialise
from distill.stages.layouts import Further
from distill.stages.replace import mixers_for
from distill.text.windows import Calibration
from students.config import Layout
from students.mixers.mixer import Mixer
from students.skeleton import Student
from students.slot import MixerSlot


def choose_layers(
    session: Session,
    folder: RunDir,
    entry: StageEntry,
    student: Student,
    calibration: Calibration,
    console: Console,
    stopper: Stopper,
) -> list[int]:
    """Choose the layers of a student that keep attention, with a stage's scorer. All measurements are kept in the folder.

    Args:
        calibration: text for stand-ins that are the recipe's mixers.

    Raises:
        UserError: the budget does not fit, or the folder has measurements of another teacher, recipe or text.
        Interrupted: stopped early, with all measurements kept.
    """
    recipe = session.recipe

    def choose(records: Records) -> dict[str, Any]:
        there = [layer for layer in range(len(student.layout.pattern)) if layer not in student.layout.converted]
        options = numbered(recipe, entry, there, len(student.layout.pattern))
        with stopper.listening(), _switchable(session, entry, student, there, options, calibration) as switched:
            measurer = PresentMeasurer(session, options, records, console, stopper)
            measurer.layers, measurer.switched = len(there), switched
            found = chosen_by(measurer)
        return _named(found, there, recipe, entry, student.layout)

    chosen = chosen_once(session, folder, choose, f"selection-{entry.key}.json")
    console.print(f"  layers chosen by {chosen['by']}: {chosen['pattern']}", highlight=False)
    return chosen["layers"]


class PresentMeasurer(Measurer):
    """A measurer of a student whose attention layers can be switched, numbered from 0."""

    layers: int = 0

    @cached_property
    def switched(self) -> Switched:
        """The switched student, which the creator of this object sets."""
        raise NotImplementedError


def numbered(recipe: Recipe, entry: StageEntry, there: Sequence[int], depth: int) -> Options:
    """The options of a stage's scorer, rewritten for the layers that have attention, numbered from 0.

    Raises:
        UserError: the budget does not fit them, or a protected layer is not one of them.
    """
    key = f"{recipe.name}: {key_of(recipe, entry)}.pattern"
    options, count = replacing_options(recipe, entry, recipe.name), cast(Further, entry.options).kept(depth)
    given = options.protect if "protect" in options.model_fields_set else [one for one in options.protect if one in there]
    if wrong := [layer for layer in given if layer not in there]:
        raise UserError(f"{key}.protect names layer {wrong[0]}, and the layers with attention are {list(there)}")
    if not max(1, len(given)) <= count < len(there):
        raise UserError(
            f"{key}.keep is {options.keep}, {count} of {depth} layers; {len(there)} have attention then, and {len(given)} "
            f"of them are protected ({given}); keep from {max(1, len(given))} to {len(there) - 1}"
        )
    return options.model_copy(update={"keep": count, "protect": [list(there).index(layer) for layer in given]})


@contextmanager
def _switchable(
    session: Session,
    entry: StageEntry,
    student: Student,
    there: Sequence[int],
    options: Options,
    calibration: Calibration,
) -> Iterator["Switchable"]:
    """Put a switch into every layer of the student that has attention, and restore the student when the block ends."""
    layout, place = student.layout, student.place
    with session.accelerator.autocast():
        if options.stand_in == "mixer":
            everywhere = cast(Further, entry.options).after(layout, session.recipe.mixers, [])
            mixers = mixers_for(session.teacher, student, everywhere, cast(Initialise.Options, entry.options), calibration)
        else:
            source = as_source(session.teacher, student)
            everywhere = Layout(STAND_IN * len(layout.pattern), {STAND_IN: untrained(options)})
            mixers, _ = further_mixers(source, everywhere, attention_shapes(source, there), there)
    inside = cast(nn.ModuleList, student.get_submodule(place.layers))
    attentions = [getattr(inside[layer], place.name) for layer in there]
    try:
        yield Switchable(student, there, attentions, mixers)
    finally:
        for layer, attention in zip(there, attentions, strict=True):
            setattr(inside[layer], place.name, attention)
        student.layout = layout
        join_types(student)


class Switchable(Switched):
    """A student with a switch in each of the given layers, which are numbered from 0."""

    def __init__(
        self, student: Student, layers: Sequence[int], attentions: Sequence[nn.Module], mixers: dict[int, Mixer]
    ) -> None:
        self.model, self.switches, place = student, [], student.place
        inside = cast(nn.ModuleList, student.get_submodule(place.layers))
        for layer, attention in zip(layers, attentions, strict=True):
            slot = MixerSlot(mixers[layer], layer, place.documents)
            self.switches.append(Switch(attention, slot.train(student.training)))
            setattr(inside[layer], place.name, self.switches[-1])
        whole = STAND_IN * len(student.layout.pattern)
        student.layout = Layout(whole, {STAND_IN: {"mixer": "attention"}})  # a layout for which no cache is made
        self.model.requires_grad_(False)
        join_types(student)


def _named(found: dict[str, Any], there: Sequence[int], recipe: Recipe, entry: StageEntry, before: Layout) -> dict[str, Any]:
    """A scorer's result with the layers' numbers in the student."""
    stay = [there[number] for number in found["layers"]]
    after = cast(Further, entry.options).after(before, recipe.mixers, stay)
    ranking = [{**one, "name": str(there[int(one["name"])])} for one in found["ranking"]]
    return {**found, "layers": stay, "ranking": ranking, "pattern": after.pattern, "mixers": after.mixers}
