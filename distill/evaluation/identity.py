"""The identity check before training: a student without conversions, or with plain attention, must equal its teacher.

It finds errors in a checkpoint, or in the entry of a model family: a tensor in the wrong place, a wrong norm or rotation, a
window or a boundary between documents that mixers ignore, a layer that is left out while it is recomputed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from distill.build import as_source, attention_shapes, build
from distill.compat import keep_layers, recompute_layers
from distill.errors import UserError
from distill.stages.nonfinite import first_nonfinite, told
from distill.text.windows import Batch
from students.config import Layout, Shapes
from students.entry import from_dict
from students.kernels import backend
from students.mixers import make_mixer
from students.mixers.mixer import Shape
from students.mixers.transfer import Projections
from students.skeleton import Student
from students.slot import MixerSlot
from teachers.teacher import Teacher

TOKENS = 24  # two documents, of a third and of two thirds
WINDOW = 7  # a teacher's windows are narrowed to this, so that they matter in so short a text
SMALL = 300e6  # parameters below which one thread is used: several would wait for each other for seconds on a busy machine
TOLERANCE = {"float32": 2e-3, "tf32": 3e-2, "half": 1e-1}  # ||found - wanted|| / ||wanted||


@dataclass
class Pass:
    """The results of one forward pass: logits, the output of each layer, and what `at_slot` returned for each attention."""

    logits: Tensor
    layers: list[Tensor]
    slots: dict[int, Any]


@torch.no_grad()
def check_identity(teacher: Teacher, layout: Layout) -> dict:
    """Compare a student without conversions with its teacher on a few dozen tokens, in one forward pass of each.

    The student runs as in training, with its layers recomputed. A quantised teacher runs with its original weights. Memory:
    one layer's attention, and the activations.

    Returns:
        the relative error of the logits with nothing converted ("logits"), that of each converted layer's attention with
        plain attention in its place ("layers", by layer), the largest of these ("attention"), its layer ("layer"), and the
        duration of the check ("seconds").

    Raises:
        UserError: the teacher differs from its files, its logits are not finite, a part of the student got no value, or
            teacher and student differ. The message names the first layer that differs.
    """
    began = time.monotonic()
    try:
        teacher.check_account()
    except ValueError as error:
        raise UserError(str(error)) from error
    batch, allowed = _text(teacher), _tolerance(teacher)
    with teacher.as_it_was(), teacher.narrow_windows(WINDOW), _threads(teacher):
        student, _ = build(teacher, Layout("A" * teacher.n_layers))
        wanted = _run(teacher.model, teacher, batch, {"position_ids": batch.positions}, lambda layer, *seen: seen[-1])
        _check_finite(teacher, batch, wanted)
        at_slot = partial(_attention_error, teacher, from_dict(student.config.distill)[2], set(layout.converted), wanted)
        recompute_layers(student, {"use_reentrant": False})
        try:
            found = _run(student, teacher, batch, {"document_ids": batch.documents}, at_slot)
        finally:
            keep_layers(student)
    logits = _error(found.logits, wanted.logits)
    if not logits <= allowed:
        raise UserError(
            f"a student of {teacher.reference} with nothing swapped is not its teacher: "
            f"{_first_difference(wanted, found, allowed)} differs (logits by {logits:.2g} of their size, {allowed:.0e} is "
            "allowed); this version of distill reads the checkpoint differently"
        )
    errors = {layer: error for layer, error in sorted(found.slots.items()) if error is not None}
    wrong = next((layer for layer, error in errors.items() if not error <= allowed), None)
    if wrong is not None:
        raise UserError(
            f"layer {wrong} of {teacher.reference} with plain attention in its place differs from the teacher's by "
            f"{errors[wrong]:.2g} of its output, {allowed:.0e} is allowed: mixers would start from another attention"
        )
    worst = max(errors, key=lambda layer: errors[layer], default=None)
    return {
        "logits": logits,
        "attention": 0.0 if worst is None else errors[worst],
        "layer": worst,
        "layers": {str(layer): error for layer, error in errors.items()},
        "seconds": round(time.monotonic() - began, 3),
    }


@dataclass
class Before:
    """A student's results on the text of the check, before some of its layers are converted.

    logits: the student's. plain: by layer, the relative error of plain attention in place of the student's own.
    """

    logits: Tensor
    plain: dict[int, float]


@torch.no_grad()
def before_replacing(teacher: Teacher, student: Student, layers: Sequence[int]) -> Before:
    """Compute what `check_replaced` compares with, before the student is changed.

    Raises:
        UserError: plain attention differs from a layer's own attention, naming the layer.
    """
    source, batch = as_source(teacher, student), _text(teacher)
    plain: dict[int, float] = {}

    def at_slot(layer: int, inputs: tuple, keywords: dict, out: Tensor) -> None:
        if layer in layers:
            shape = attention_shapes(source, [layer]).at(layer)
            plain[layer] = _plain_error(source, shape, layer, inputs, keywords, out)

    with _threads(teacher):
        logits = _run(student, teacher, batch, {"document_ids": batch.documents}, at_slot).logits
    allowed = _tolerance(teacher)
    if wrong := [layer for layer in layers if not plain[layer] <= allowed]:
        raise UserError(
            f"layer {wrong[0]} of the student with plain attention in its place differs from the student's own by "
            f"{plain[wrong[0]]:.2g} of its output, {allowed:.0e} is allowed: its mixer would start from another attention"
        )
    return Before(logits, plain)


@torch.no_grad()
def check_replaced(teacher: Teacher, student: Student, taken: Mapping[int, nn.Module], before: Before) -> dict:
    """Put the attention of converted layers back for one forward pass, and compare the student with itself before.

    Args:
        taken: the attention modules that the layers had before, by layer.

    Returns:
        the relative error of the logits ("logits"), and that of plain attention by layer ("layers").

    Raises:
        UserError: something else of the student changed.
    """
    layers, name = cast(nn.ModuleList, student.get_submodule(student.place.layers)), student.place.name
    slots, batch = {layer: getattr(layers[layer], name) for layer in taken}, _text(teacher)
    try:
        for layer, attention in taken.items():
            setattr(layers[layer], name, attention)
        with _threads(teacher):
            found = _run(student, teacher, batch, {"document_ids": batch.documents}, lambda *seen: None)
    finally:
        for layer, slot in slots.items():
            setattr(layers[layer], name, slot)
    logits, allowed = _error(found.logits, before.logits), _tolerance(teacher)
    if not logits <= allowed:
        raise UserError(
            f"with the attention of layers {sorted(taken)} put back, the student is not what it was before they were "
            f"converted: its logits differ by {logits:.2g} of their size, {allowed:.0e} is allowed"
        )
    return {"logits": logits, "layers": {str(layer): error for layer, error in sorted(before.plain.items())}}


def _check_finite(teacher: Teacher, batch: Batch, wanted: Pass) -> None:
    """Refuse a teacher whose own logits are not finite: nothing can be compared with them, nor learned from them.

    Raises:
        UserError: naming the first layer that is not finite, and whether weights are damaged or numbers overflow.
    """
    if not bool(wanted.logits.isfinite().all()):
        forward = partial(teacher.model, input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
        place = first_nonfinite(teacher.model, forward, teacher.family.layers) or "the output head"
        raise UserError(f"{teacher.reference}: {told('teacher', place, teacher.model)}; choose another teacher")


@contextmanager
def _threads(teacher: Teacher) -> Iterator[None]:
    """Use one thread for a small model on a CPU."""
    usual = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in teacher.model.parameters()) < SMALL
    torch.set_num_threads(1 if small and teacher.device.type == "cpu" else usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _text(teacher: Teacher) -> Batch:
    """Return random tokens, the same every time."""
    vocabulary = cast(nn.Embedding, teacher.model.get_input_embeddings()).num_embeddings
    ids = torch.randint(vocabulary, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(TOKENS) >= TOKENS // 3).long()[None]
    positions = torch.arange(TOKENS)[None] - documents * (TOKENS // 3)
    weights = torch.ones(1, TOKENS)
    return Batch(ids[:, :-1], documents, positions, ids[:, 1:], weights, documents).to(teacher.device)


def _tolerance(teacher: Teacher) -> float:
    if teacher.model.dtype.itemsize < 4:
        return TOLERANCE["half"]
    tf32 = teacher.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return TOLERANCE["tf32" if tf32 else "float32"]


def _run(model: PreTrainedModel, teacher: Teacher, batch: Batch, arguments: dict, at_slot: Callable) -> Pass:
    """Run one forward pass with hooks. at_slot: called with each attention's layer, arguments, keywords and output."""
    layers: list[Tensor] = []
    slots: dict[int, Any] = {}
    hooks: list[RemovableHandle] = []

    def keep_layer(module: nn.Module, inputs: tuple, out: Any) -> None:
        layers.append(out[0] if isinstance(out, tuple) else out)

    def keep_slot(module: nn.Module, inputs: tuple, keywords: dict, out: Any, layer: int) -> None:
        slots[layer] = at_slot(layer, inputs, keywords, out[0] if isinstance(out, tuple) else out)

    for index, layer in enumerate(cast(nn.ModuleList, model.get_submodule(teacher.family.layers))):
        hooks.append(layer.register_forward_hook(keep_layer))
        slot = getattr(layer, teacher.family.slot)
        hooks.append(slot.register_forward_hook(partial(keep_slot, layer=index), with_kwargs=True))
    try:
        logits = model(input_ids=batch.ids, use_cache=False, **arguments).logits
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(logits, layers, slots)


def _attention_error(
    teacher: Teacher,
    shapes: Shapes,
    converted: set[int],
    wanted: Pass,
    layer: int,
    inputs: tuple,
    keywords: dict,
    *unused: object,
) -> float | None:
    """Return the relative error of plain attention in a layer's slot, called as the student calls its attention.

    None if the layer is not converted.
    """
    if layer not in converted:
        return None
    return _plain_error(teacher, shapes.at(layer), layer, inputs, keywords, wanted.slots[layer])


def _plain_error(source: Teacher, shape: Shape, layer: int, inputs: tuple, keywords: dict, wanted: Tensor) -> float:
    """Return the relative error of plain attention, made from a layer's projections and called with these arguments."""
    weights = source.attention_weights(layer)
    with torch.device("meta"):
        mixer = make_mixer("attention", shape, {})
    mixer = mixer.to(weights.q.dtype).to_empty(device=source.device)
    mixer.from_attention(Projections(**vars(weights)))
    with backend("reference"):
        return _error(MixerSlot(mixer, layer, source.family.documents)(*inputs, **keywords)[0], wanted)


def _first_difference(wanted: Pass, found: Pass, allowed: float) -> str:
    """Name the first part of the two models whose outputs differ."""
    for layer, (theirs, ours) in enumerate(zip(wanted.layers, found.layers, strict=True)):
        if not _error(ours, theirs) <= allowed:
            return f"layer {layer}"
    return "the final norm or the output head"


def _error(found: Float[Tensor, "..."], wanted: Float[Tensor, "..."]) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-20)).item()
