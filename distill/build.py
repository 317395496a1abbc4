"""Building a student from a teacher: shared backbone weights, mixers made from attention, and a record of every weight."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import students
from distill.errors import UserError
from distill.generation_config import inherited
from distill.mixed_types import join_types
from students.config import Layout, Place, Shapes
from students.meta_tokens import START as META_START
from students.mixers.mixer import Mixer, Shape
from students.mixers.transfer import Projections, Transfer
from students.skeleton import Student
from teachers.teacher import Teacher


def attention_shapes(teacher: Teacher, layers: Iterable[int] | None = None) -> Shapes:
    """The shapes and constants of the teacher's attention that mixers are built from. Weight values are not read.

    layers: the layers to describe; all of them by default.
    """
    return Shapes.of({layer: _shape(teacher, layer) for layer in (range(teacher.n_layers) if layers is None else layers)})


def _shape(teacher: Teacher, layer: int) -> Shape:
    config, weights, rules = teacher.config, teacher.attention_weights(layer), teacher.logit_rules(layer)
    eps = (getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"))
    return Shape(
        d_model=config.hidden_size,
        n_heads=weights.q.shape[0],
        n_kv_heads=weights.k.shape[0],
        head_dim=weights.q.shape[1],
        qkv_bias=any(bias is not None for bias in (weights.q_bias, weights.k_bias, weights.v_bias)),
        o_bias=weights.o_bias is not None,
        rope=rules.rope,
        softmax_scale=rules.scale,
        softcap=rules.softcap,
        window=rules.window,
        qk_norm=rules.norm,
        qk_norm_eps=rules.norm_eps,
        norm_eps=next((value for value in eps if value is not None), 1e-5),
    )


def layout_of(pattern: str, mixers: Mapping[str, dict], layers: int, where: str, meta_tokens: int = 0) -> Layout:
    """A recipe's layout for a model of `layers` layers.

    Raises:
        UserError: `Layout.over` refuses it; the message begins with `where`.
    """
    try:
        return Layout.over(layers, pattern, dict(mixers), meta_tokens)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def empty(teacher: Teacher, layout: Layout) -> Student:
    """A student without weights, on the meta device, to see its mixers and what they refuse.

    Raises:
        UserError: a mixer refuses its options.
    """
    place = Place(teacher.family.layers, teacher.family.slot, teacher.family.documents)
    try:
        return students.build(teacher.config, layout, place, attention_shapes(teacher))
    except ValueError as error:
        raise UserError(f"the layout cannot be built on {teacher.reference}: {error}") from error


def build(teacher: Teacher, layout: Layout) -> tuple[Student, dict[int, Transfer]]:
    """Build a student on the teacher's device. Every mixer is made from its layer's attention.

    Weights that are not converted share the teacher's memory and type; a stage that trains them makes float32 masters of
    them first (`distill.stages.masters`). Mixers are float32, and are made from the attention weights in float32.

    For a quantised teacher the student has the weights from before quantisation. Those of linear layers take memory of
    their own.

    Returns:
        the student, and each converted layer's transfer record.

    Raises:
        UserError: a mixer refuses its options, a tensor has no value, or see `generation_config.inherited`.
        RuntimeError: a mixer did not record where one of its parameters comes from.
    """
    with teacher.as_it_was():
        return _build(teacher, layout)


def _build(teacher: Teacher, layout: Layout) -> tuple[Student, dict[int, Transfer]]:
    student = empty(teacher, layout)
    own = set(dict(student.named_parameters())) | set(student.state_dict())
    kept = {name: tensor for name, tensor in teacher.model.state_dict().items() if name in own}
    student.load_state_dict(kept, strict=False, assign=True)
    _share_buffers(teacher.model, student)
    student.tie_weights()
    transfers = _fill(teacher, student)
    if student.meta_tokens is not None:
        student.meta_tokens.to_empty(device=teacher.device).start(_embedded(teacher))
    if lost := next((name for name, tensor in _tensors(student) if tensor.is_meta), None):
        raise UserError(
            f"{lost} of a student of {teacher.reference} has no value: the teacher holds no tensor of that name; merge or "
            "remove the teacher's adapter or quantisation first"
        )
    student.requires_grad_(False).eval()
    join_types(student)
    student.generation_config = inherited(teacher.model.generation_config, teacher.reference)
    return student, transfers


def _embedded(teacher: Teacher) -> Tensor:
    return cast(nn.Embedding, teacher.model.get_input_embeddings()).weight


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _fill(teacher: Teacher, student: Student) -> dict[int, Transfer]:
    """Make every mixer from its layer's attention; mixers that share parameters are made from all their layers together."""
    mixers = student.mixers
    transfers: dict[int, Transfer] = {}
    for group in student.layout.groups:
        sites = [mixers[layer].to_empty(device=teacher.device) for layer in group]
        attentions = [_projections(teacher, layer) for layer in group]
        transfers.update(zip(group, type(sites[0]).from_attentions(sites, attentions), strict=True))
    for layer, mixer in mixers.items():
        _account(mixer, transfers[layer], layer)
    return dict(sorted(transfers.items()))


def as_source(teacher: Teacher, student: Student) -> Teacher:
    """A student wrapped as a `Teacher`, so that further mixers can be made from the attention that it keeps."""
    return Teacher(f"the student of {teacher.reference}", student, teacher.tokenizer, teacher.family)


def further_mixers(
    source: Teacher, layout: Layout, shapes: Shapes, layers: Sequence[int]
) -> tuple[dict[int, Mixer], dict[int, Transfer]]:
    """Make mixers for further layers of a student, each from its layer's present attention. The student is not changed.

    Args:
        source: see `as_source`. layout: the layout that the student will have. shapes: of all its attention.

    Raises:
        UserError: a mixer refuses its options.
        RuntimeError: a mixer did not record where one of its parameters comes from.
    """
    mixers, transfers = {}, {}
    for layer in layers:
        try:
            with torch.device("meta"):
                mixer = layout.make(layer, shapes.at(layer))
        except ValueError as error:
            raise UserError(f"layer {layer} of {source.reference}: {error}") from error
        mixer.to_empty(device=source.device)
        transfers[layer] = mixer.from_attention(_projections(source, layer))
        _account(mixer, transfers[layer], layer)
        mixers[layer] = mixer.requires_grad_(False).eval()
    return mixers, transfers


def _projections(teacher: Teacher, layer: int) -> Projections:
    """A layer's projections in float32 or wider, whatever the teacher's type; mixers are made from them."""
    tensors = vars(teacher.attention_weights(layer))
    wide: dict[str, Any] = {
        name: one if one is None else one.to(torch.promote_types(one.dtype, torch.float32)) for name, one in tensors.items()
    }
    return Projections(**wide)


def _share_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give the target the source's buffers, including those outside the state dict (rotary tables)."""
    modules = dict(target.named_modules())
    for name, buffer in source.named_buffers():
        path, _, attribute = name.rpartition(".")
        if path in modules and attribute in dict(modules[path].named_buffers(recurse=False)):
            setattr(modules[path], attribute, buffer)


def _account(mixer: nn.Module, transfer: Transfer, layer: int) -> None:
    if missing := {name for name, _ in _tensors(mixer)} - set(transfer.sources):
        raise RuntimeError(f"layer {layer}: {type(mixer).__name__}.from_attention did not set {sorted(missing)}")


def transfer_report(teacher: Teacher, student: Student, transfers: dict[int, Transfer]) -> dict:
    """The transfer report: where every weight of the student came from, and which of the teacher's weights are unused."""
    sources = {}
    inside = {student.mixer_prefix(layer): transfer for layer, transfer in transfers.items()}
    for name, _ in student.named_parameters():
        if not name.startswith(student.own_prefixes):
            sources[name] = "copied from the teacher"
        elif not name.startswith(tuple(inside)):
            sources[name] = META_START
    for prefix, transfer in inside.items():
        sources.update({prefix + name: source for name, source in transfer.sources.items()})
    unused = [
        f"{teacher.family.layers}.{layer}.{teacher.family.slot}.{name}"
        for layer, transfer in transfers.items()
        for name in sorted(set(teacher.attention_weights(layer).named()) - transfer.used)
    ]
    ignored = {"ignored": list(teacher.ignored)} if teacher.ignored else {}
    return {"teacher": teacher.reference, "sources": sources, "unused": unused} | ignored


def recall_transfers(student: Student, transfers: dict[int, Transfer], report: dict) -> None:
    """Restore the sources of the mixers' parameters from a saved `transfer_report`, when a run continues."""
    for layer, transfer in transfers.items():
        prefix = student.mixer_prefix(layer)
        inside = {name: source for name, source in report.get("sources", {}).items() if name.startswith(prefix)}
        transfer.sources.update({name.removeprefix(prefix): source for name, source in inside.items()})


def count_parameters(module: nn.Module) -> int:
    """The number of parameters; shared parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters())
