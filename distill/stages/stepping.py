"""Fast training steps on a GPU: attention within documents without masks, and decoder layers under torch.compile.

Both hold for the length of a step only. A layer is compiled in place: its `forward` is replaced during the step, and nothing
else of the model changes. Mixers and our own ops are not compiled; compilation fuses the norms, rotary embeddings,
activations, residual sums and casts around them. In layer-by-layer stages only the teacher's norms and MLPs are compiled,
because the hooks that observe attention would be compiled with a whole layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn

from distill.compat import compiling
from distill.packed_attention import packed_attention, serves
from distill.stages.stage import Stage
from students import kernels
from students.skeleton import Student


class Stepping:
    """The context of a stage's steps: put `with stepping():` around each.

    Args:
        narrow: whether the run computes in 16 bits. compiled: whether layers are compiled; None: only on a GPU.
    """

    def __init__(self, stage: Stage, narrow: bool, compiled: bool | None = None) -> None:
        models = [stage.teacher, *([] if stage.running is None or stage.running is stage.teacher else [stage.running])]
        self._configs = [stage.student.config, *(model.config for model in models)]
        cuda = stage.teacher.device.type == "cuda"
        self._packs = cuda and narrow and kernels.chosen() != "reference" and all(map(serves, models))
        self._compiled: dict[nn.Module, Callable] = {}
        if cuda if compiled is None else compiled:
            self._compiled = {part: torch.compile(part.forward, dynamic=False) for part in _parts(stage)}
            if stage.whole_student:  # a traced mixer breaks into ten graphs, whose calls cost more than fusion saves
                self._compiled |= {slot: torch.compiler.disable(slot.forward) for slot in _slots(stage.student)}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._packs:
                stack.enter_context(packed_attention(*self._configs))
            if self._compiled:
                stack.enter_context(compiling())
                stack.enter_context(_replaced(self._compiled))
            yield


def _parts(stage: Stage) -> list[nn.Module]:
    """The modules to compile: whole decoder layers in end-to-end stages, else the teacher's layers without attention."""
    teacher, student = stage.running, stage.student
    layers = [] if teacher is None else list(_listed(teacher.model, teacher.family.layers))
    if stage.whole_student:
        return layers + list(_listed(student, student.place.layers))
    slot = None if teacher is None else teacher.family.slot
    return [part for layer in layers for name, part in layer.named_children() if name != slot]


def _listed(model: nn.Module, layers: str) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(layers))


def _slots(student: Student) -> list[nn.Module]:
    """The slots of the student: the modules that hold its mixers."""
    layers, place = _listed(student, student.place.layers), student.place.name
    return [getattr(layers[index], place) for index in student.layout.converted]


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
