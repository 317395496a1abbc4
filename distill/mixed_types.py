"""Students of two number types: the backbone in the teacher's bfloat16, the mixers and trained masters in float32.

Autocast handles such a model. Without autocast (a run in float32, generation outside a run), hooks give each float32 part
a float32 input and cast its output to the type of its neighbours. The residual stream so keeps the type of the embeddings,
as in the teacher.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from distill.compat import kept_in_float32
from students.skeleton import Student
from students.slot import MixerSlot

HANDLES = "type_hooks"  # where a module keeps the handles of its hooks


def join_types(student: Student) -> None:
    """Add the casting hooks to the float32 parts of a student. Call it again when the set of float32 parameters changes."""
    for module in student.modules():
        for handle in vars(module).pop(HANDLES, ()):
            handle.remove()
    narrow = narrow_type(student)
    if narrow is None:
        return
    head = student.get_output_embeddings()
    for part in _wide_parts(student):
        handles = [part.register_forward_pre_hook(_widen, with_kwargs=True)]
        if part is not head:  # logits stay float32
            handles.append(part.register_forward_hook(partial(_narrow, narrow)))
        vars(part)[HANDLES] = handles


def narrow_type(student: Student) -> torch.dtype | None:
    """The 16-bit type of a student's backbone; None if all of it is float32 or wider."""
    own = _own_prefixes(student)
    kinds = (tensor.dtype for name, tensor in student.named_parameters() if not name.startswith(own))
    return next((kind for kind in kinds if kind.is_floating_point and kind.itemsize == 2), None)


def widest_type(student: Student) -> torch.dtype:
    """The widest type of a student's parameters."""
    kinds = [tensor.dtype for tensor in student.parameters() if tensor.is_floating_point()]
    return max(kinds, key=lambda kind: torch.finfo(kind).bits)


def _wide_parts(student: Student) -> Iterator[nn.Module]:
    """Slots with a mixer, and modules of the backbone with a float32 parameter that transformers would not keep so."""
    kept, own = kept_in_float32(student), _own_prefixes(student)
    for path, module in student.named_modules():
        if isinstance(module, MixerSlot):
            yield module
        elif not f"{path}.".startswith(own) and ".lora_" not in path and not kept & set(path.split(".")):
            held = {name: tensor for name, tensor in module.named_parameters(recurse=False) if name not in kept}
            if any(tensor.dtype in (torch.float32, torch.float64) for tensor in held.values()):
                yield module


def _own_prefixes(student: Student) -> tuple[str, ...]:
    """The prefixes of parameter names that do not belong to the backbone; none for a plain transformers model."""
    return getattr(student, "own_prefixes", ())


def _widen(module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict] | None:
    """Cast the hidden states to float32. A slot's other arguments (rotary tables, masks) are not changed."""
    places = arguments[:1] or (keywords.get("hidden_states"),)
    if not _is_narrow(places[0]):
        return None
    wide = places[0].float()
    return ((wide, *arguments[1:]), keywords) if arguments else (arguments, {**keywords, "hidden_states": wide})


def _narrow(kind: torch.dtype, module: nn.Module, arguments: tuple, output):
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or first.dtype != torch.float32 or torch.is_autocast_enabled(first.device.type):
        return None
    return (first.to(kind), *output[1:]) if isinstance(output, tuple) else first.to(kind)


def _is_narrow(x: object) -> bool:
    return (
        isinstance(x, Tensor) and x.is_floating_point() and x.itemsize < 4 and not torch.is_autocast_enabled(x.device.type)
    )
