"""Converting further layers of an existing student: mixers replace kept attention, and the layout is updated.

The student's other layers stay unchanged. `further` refuses mixers that would need a change of them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

from torch import nn

from students.config import Layout
from students.mixers import mixer_class
from students.mixers.mixer import Mixer
from students.shared_keys import check_shared_keys
from students.skeleton import Student
from students.slot import MixerSlot


def further(before: Layout, after: Layout) -> list[int]:
    """The layers that the layout `after` converts and the layout `before` does not.

    Raises:
        ValueError: a converted layer would get another mixer or its attention back, no layer would be converted, or a mixer
            cannot be added to an existing student. The message names layer, letter and reason.
    """
    if len(after.pattern) != len(before.pattern):
        raise ValueError(f"the layout names {len(after.pattern)} layers, but the student has {len(before.pattern)}")
    for layer in before.converted:
        had, gets = (before.pattern[layer], before.mixer_of(layer)), (after.pattern[layer], after.mixer_of(layer))
        if gets[1] is None:
            raise ValueError(f"layer {layer} is converted already ({had[0]}), and its attention cannot be restored")
        if had != gets:
            raise ValueError(
                f"layer {layer} is converted already, to {had[0]} {had[1]}; it cannot become {gets[0]} {gets[1]}"
            )
    found = [layer for layer in after.converted if before.mixer_of(layer) is None]
    if not found:
        raise ValueError("all layers of the layout are converted already; name a layer that still has attention")
    if after.meta_tokens != before.meta_tokens:
        raise ValueError(
            f"meta_tokens would change from {before.meta_tokens} to {after.meta_tokens}; they are learned from a student's "
            "beginning on and cannot be changed later"
        )
    if before.meta_tokens:
        raise ValueError(
            f"the student has {before.meta_tokens} meta tokens, which its kept attention has learned to read; a mixer made "
            "later is calibrated without meta tokens, so no layer can be added"
        )
    for layer in found:
        _check_addable(layer, after)
    if moved := [layer for layer in before.givers if before.givers[layer] != after.givers.get(layer)]:
        raise ValueError(
            f"layer {moved[0]} shares the keys and values of layer {before.givers[moved[0]]}, and would share those of "
            f"layer {after.givers[moved[0]]} once that layer is converted; leave that layer out"
        )
    return found


def _check_addable(layer: int, layout: Layout) -> None:
    letter, options = layout.pattern[layer], layout.mixer_of(layer)
    assert options is not None, "converted layers have a mixer"
    name = options["mixer"]
    if mixer_class(name).shares:
        raise ValueError(
            f"{name} ({letter}) cannot be added later: its layers share one set of parameters, made from the attention of "
            "all of them together; name them in the first layout"
        )
    if options.get("share_kv"):
        raise ValueError(
            f"{name} ({letter}) cannot be added later with share_kv: layer {layer} would read another layer's keys and "
            "values, which that layer was not trained to leave; name it in the first layout"
        )


def convert(student: nn.Module, layout: Layout, mixers: Mapping[int, Mixer]) -> dict[int, nn.Module]:
    """Replace attention by mixers, in place; `student.newest` then names their layers.

    Args:
        layout: the student's new layout. mixers: one for each layer that `further` names.

    Returns:
        the replaced attention modules, by layer.

    Raises:
        ValueError: see `further`; or `mixers` has other layers.
    """
    student = cast(Student, student)
    layers = further(student.layout, layout)
    if sorted(mixers) != layers:
        raise ValueError(f"the layers to convert are {layers}, but there are mixers for {sorted(mixers)}")
    keys_of = {giver: giver for giver in layout.givers.values()} | layout.givers
    inside, name = cast(nn.ModuleList, student.get_submodule(student.place.layers)), student.place.name
    taken: dict[int, nn.Module] = {}
    for layer in layers:
        taken[layer] = getattr(inside[layer], name)
        slot = MixerSlot(mixers[layer], layer, student.place.documents, keys_of.get(layer))
        setattr(inside[layer], name, slot.train(student.training))
    student.layout, student.givers, student.newest = layout, layout.givers, layers
    student._keep_in_fp32_modules_strict |= student.float32_names
    student.config.distill = {**student.config.distill, "layout": asdict(layout)}
    check_shared_keys(student.mixers, student.givers, student.shapes, student.place)
    return taken
