"""Sharding of an end-to-end stage: masters, gradients and AdamW moments divided over processes with `fully_shard`.

Each decoder layer is one group, and the embeddings with the head are one. Some parameters stay whole on every process, and
`distill.training.reduction` averages their gradients: vectors (norms, biases, decays), meta tokens, those that a mixer keeps
in float32, and blocks that several layers share. They are small; the cast of a group would narrow the float32 ones; and a
shared block belongs to no single group. When the stage is over, `restore` makes an ordinary student again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from distill.compat import kept_in_float32, take_apart
from distill.memory import capacity
from distill.stages.stage import Stage
from students.skeleton import Student
from teachers.teacher import Teacher

SUMMED_WHOLE = 4  # whole gradients that are summed over micro-batches may take this part of memory: one quarter


class Sharding:
    """A stage's student divided over processes, and its teacher with `teacher_too`.

    Args:
        stage: prepared; its trained parameters have their own memory. teacher_too: also divide the teacher's layers and the
            student's frozen parameters. narrow: the type in which parameters are gathered; None for their own.
    """

    def __init__(self, stage: Stage, device: torch.device, *, teacher_too: bool, narrow: torch.dtype | None) -> None:
        self.stage, self.student, self.teacher = stage, stage.student, stage.teacher if teacher_too else None
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, cast_forward_inputs=False)
        self._sources = self._shared_with_teacher() if teacher_too else {}
        for _, parameter in stage.trained().values():
            parameter.requires_grad_(True)
        self.names = self._choose(teacher_too)
        self._undo: list[Callable[[], object]] = []
        self._shard_student(narrow)
        if teacher_too:
            self._shard_teacher()
        self.parts: dict[str, nn.Parameter] = {  # the same objects stay while whole forms are gathered and freed
            name: parameter for name, parameter in self.student.named_parameters() if isinstance(parameter, DTensor)
        }
        trained = sum(parameter.numel() for parameter in self.parts.values() if parameter.requires_grad)
        self.sums_whole = 4 * trained * SUMMED_WHOLE <= capacity(device)

    def micro_batch(self, last: bool) -> None:
        """Prepare the next micro-batch. last: whether it is the last of a step.

        Gradients are reduced over processes after the last micro-batch if whole sums fit into memory, else after each."""
        cast(FSDPModule, self.student).set_requires_gradient_sync(last or not self.sums_whole)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep every parameter whole on every process while the block runs, for calls that bypass `forward`.

        Parameters have the type that they compute in. All processes enter and leave together."""
        modules = list(self._modules())
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(not isinstance(module, type(self.student)), recurse=False)
                module.reshard()

    @torch.no_grad()
    def restore(self) -> None:
        """Make student and teacher whole again on every process, in the masters' type. All processes call it together."""
        for module in self._modules():
            module.reshard()
        for undo in self._undo:
            undo()
        self._undo = []
        for model in self._models():
            whole_again(model)
        for name, source in self._sources.items():  # shares the teacher's memory again
            self.student.get_parameter(name).data = cast(Teacher, self.teacher).model.get_parameter(source).data

    # the parameters to divide, and their division

    def _choose(self, frozen_too: bool) -> set[str]:
        """Names of the parameters to divide: matrices that may be gathered in a narrower type."""
        student, wide = self.student, kept_in_float32(self.student) | self.student.float32_names
        trained, several = self.stage.trained(), _of_several_layers(student)
        found = set()
        for name, parameter in student.named_parameters():
            path, _, _ = name.rpartition(".")
            role = trained[name][0] if name in trained else "rest"
            whole = parameter.dim() < 2 or name.startswith("meta_tokens.") or not wide.isdisjoint(name.split("."))
            whole |= name in several or (role == "new" and not isinstance(student.get_submodule(path), nn.Linear))
            if not whole and (frozen_too or name in trained):
                found.add(name)
        return found

    def _shard_student(self, narrow: torch.dtype | None) -> None:
        student = self.student
        layers = cast(nn.ModuleList, student.get_submodule(student.place.layers))
        ours = {id(student.get_parameter(name)) for name in self.names}
        ignored = {parameter for parameter in student.parameters() if id(parameter) not in ours}
        for layer in layers:
            if any(id(parameter) in ours for parameter in layer.parameters()):
                self._fully_shard(layer, ignored)
        embed = student.get_input_embeddings()
        if narrow is not None and id(embed.weight) in ours:  # keeps the residual stream in float32, as on one process
            self._undo.append(embed.register_forward_hook(lambda module, inputs, output: output.float()).remove)
        self._fully_shard(student, ignored)
        register_fsdp_forward_method(student, "hidden")
        self._undo.append(lambda: vars(student).pop("hidden"))

    def _shard_teacher(self) -> None:
        """Divide the teacher's decoder layers, in their own types.

        Embeddings and head stay whole, because losses read the head's weight."""
        teacher = cast(Teacher, self.teacher)
        model, layers = teacher.model, cast(nn.ModuleList, teacher.model.get_submodule(teacher.family.layers))
        for layer in layers:
            fully_shard(layer, mesh=self.mesh)
        inside = {id(parameter) for parameter in layers.parameters()}
        rest = {parameter for parameter in model.base_model.parameters() if id(parameter) not in inside}
        fully_shard(model.base_model, mesh=self.mesh, ignored_params=rest)

    def _fully_shard(self, module: nn.Module, ignored: set[nn.Parameter]) -> None:
        fully_shard(module, mesh=self.mesh, mp_policy=self._policy, ignored_params=ignored)
        if dist.get_backend() == "gloo":  # gloo has no mean reduction
            cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)

    def _shared_with_teacher(self) -> dict[str, str]:
        """The student's parameters that lie in the teacher's memory: name in the student to name in the teacher."""
        theirs = cast(Teacher, self.teacher).model.named_parameters()
        places = {parameter.data_ptr(): name for name, parameter in theirs}
        found = {name: places.get(parameter.data_ptr()) for name, parameter in self.student.named_parameters()}
        return {name: source for name, source in found.items() if source is not None}

    def _models(self) -> list[nn.Module]:
        return [self.student] if self.teacher is None else [self.student, self.teacher.model]

    def _modules(self) -> Iterator[FSDPModule]:
        for model in self._models():
            yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def whole_again(model: nn.Module) -> None:
    """Replace divided parameters by whole ones, tied ones by one object, and remove `fully_shard` from every module."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    whole = parameter.full_tensor()
                    made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    for module in [*model.modules()]:
        if isinstance(module, FSDPModule):
            take_apart(module)


def _of_several_layers(student: Student) -> set[str]:
    """Names of parameters that several layers use.

    These are parameters of a group's first mixer that its other mixers refer to, and parameters that are registered in more
    than one layer."""
    found, mixers = set(), student.mixers
    for owner, *others in student.layout.groups:
        for other in others:
            lacking = set(dict(mixers[owner].named_parameters())) - set(dict(mixers[other].named_parameters()))
            found |= {student.mixer_prefix(owner) + name for name in lacking}
    seen: dict[int, str] = {}
    for name, parameter in student.get_submodule(student.place.layers).named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first.split(".")[0] != name.split(".")[0]:
            found |= {f"{student.place.layers}.{first}", f"{student.place.layers}.{name}"}
    return found
