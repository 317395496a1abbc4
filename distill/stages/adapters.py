"""Low-rank adapters (LoRA, arXiv 2106.09685) on a student's skeleton, through peft: chosen, added, merged, saved.

They stand on the skeleton's linear layers (nn.Linear, and GPT-2's Conv1D, which is one too). Mixers train whole in this
stage, so that adapters there would only be trained beside their own weights, and an adapter on the head would keep the
fused loss from reading its weight; both are refused by name. Elsewhere (peft on a finished student) every layer takes one.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distill.errors import nearest
from distill.mixed_types import join_types, widest_type
from distill.stages.masters import own
from students.skeleton import Student

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names for them


def linear_layers(student: Student) -> dict[str, nn.Module]:
    """The linear layers that adapters can stand on: all outside the mixers but the head, by name."""
    inside, head = _mixer_prefixes(student), student.get_output_embeddings()
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.startswith(inside) and module is not head
    }


def targets(student: Student, wanted: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linear layers that some names mean; every one where None is given.

    Args:
        wanted: whole names of modules or their last parts ("mlp.up_proj", "up_proj"); of what they mean inside mixers,
            which train whole, nothing is taken.

    Raises:
        ValueError: a name that means no module, or one on which an adapter has no effect; what does exist is named.
    """
    linear = linear_layers(student)
    if wanted is None:
        if not linear:
            raise ValueError("train: lora finds no linear layer outside the mixers and the head; train: mixers is left")
        return linear
    found: dict[str, nn.Module] = {}
    for name in wanted:
        meant = {path: module for path, module in student.named_modules() if f".{path}".endswith(f".{name}")}
        if not meant:
            known = sorted(endings(linear))
            raise ValueError(f"lora.targets: {name!r} is no module of the student; {nearest(name, known)}{_exist(known)}")
        useful = {path: module for path, module in meant.items() if path in linear}
        if not useful:
            path, why = _why_not(student, meant)
            raise ValueError(f"lora.targets: {name!r} means {path}, {why}{_exist(endings(linear))}")
        found |= useful
    return found


def endings(linear: dict[str, nn.Module]) -> set[str]:
    """The last parts of the names of linear layers: q_proj, up_proj ..."""
    return {name.rpartition(".")[2] for name in linear}


def parameters_of(linear: dict[str, nn.Module], rank: int) -> int:
    """How many parameters adapters of a rank have on these layers."""
    return sum(rank * sum(_weight(module).shape) for module in linear.values())


def _weight(linear: nn.Module) -> Tensor:
    return cast(Tensor, linear.weight)


def check_rank(linear: dict[str, nn.Module], rank: int) -> None:
    """Refuse adapters of a rank that one of their layers cannot have.

    Raises:
        ValueError: naming the narrowest layer.
    """
    narrowest = min(linear, key=lambda name: min(_weight(linear[name]).shape))
    width = min(_weight(linear[narrowest]).shape)
    if rank > width:
        raise ValueError(f"lora.rank is {rank}, but {narrowest} has no more than rank {width}; make it {width} or less")


def add(student: Student, names: Sequence[str], rank: int, alpha: float) -> None:
    """Put adapters on linear layers, in place; their B is zero, so that the student stays what it was."""
    from peft import LoraConfig, inject_adapter_in_model

    gpt2 = any(isinstance(student.get_submodule(name), Conv1D) for name in names)  # weights stored the other way round
    config = LoraConfig(r=rank, lora_alpha=cast(Any, alpha), target_modules=list(names), fan_in_fan_out=gpt2)
    with torch.random.fork_rng():  # processes that share a run have drawn differently by now, but were seeded alike
        torch.manual_seed(torch.initial_seed())
        inject_adapter_in_model(config, student)


def adapted(student: Student) -> dict[str, Any]:
    """The layers that have adapters, by name; each knows its `get_base_layer()`."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in student.named_modules() if isinstance(module, LoraLayer)}


def merge(student: Student) -> None:
    """Add every adapter to the weight it stands on, and take it away. The weights become masters first: a student's begin as
    the teacher's."""
    for name, layer in adapted(student).items():
        base = layer.get_base_layer()
        own(base.weight)
        layer.merge()
        student.set_submodule(name, base)
    join_types(student)
    _forget(student)


def save(student: Student, folder: Path) -> None:
    """Write a student as transformers does. Adapters go beside its own weights in peft's format: transformers puts them
    back where both lie in one folder, and peft loads them onto the weights alone.

    Every tensor keeps its type: float32 of what was trained, the teacher's of the rest. config.json names the widest, which
    every tensor has once it is loaded, so that nothing that was trained is rounded.
    """
    layers = adapted(student)
    if layers:
        _save_adapters(student, folder)
    with _without(student, layers):
        student.save_pretrained(folder)
        if student.dtype != (widest := widest_type(student)):  # transformers says the type of the first weight
            student.config.dtype = widest
            student.config.save_pretrained(folder)


def merge_saved(folder: Path) -> None:
    """Merge the adapters of a saved student into its weights, in its folder and float32; without any, nothing is done."""
    if not (folder / CONFIG).exists():
        return
    from peft import PeftModel

    import students

    aside = folder / ".adapters"  # where transformers would find them it would load them itself, and save them alone
    aside.mkdir()
    for file in folder.glob("adapter_*"):
        file.rename(aside / file.name)
    PeftModel.from_pretrained(students.load(folder, dtype=torch.float32), aside).merge_and_unload().save_pretrained(folder)
    shutil.rmtree(aside)


def merged_copy(folder: Path, out: Path) -> Path:
    """Where a saved student without adapters lies: its own folder, or, where it has some, `out`: a copy into which they are
    merged, made unless it is there."""
    if not (folder / CONFIG).exists():
        return folder
    if not out.exists():
        shutil.copytree(folder, out)
        merge_saved(out)
    return out


def _save_adapters(student: Student, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(student, save_embedding_layers=False)
    named = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    student.peft_config["default"].save_pretrained(folder)


@contextmanager
def _without(student: Student, layers: dict[str, Any]) -> Iterator[None]:
    """The student with the bare layers in the place of adapted ones, while the block runs."""
    for name, layer in layers.items():
        student.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in layers.items():
            student.set_submodule(name, layer)


def _forget(student: Student) -> None:
    if "peft_config" in vars(student):
        del student.peft_config


def _mixer_prefixes(student: Student) -> tuple[str, ...]:
    return tuple(student.mixer_prefix(layer) for layer in student.mixers)


def _why_not(student: Student, meant: dict[str, nn.Module]) -> tuple[str, str]:
    """The first of the modules that a name means, and why an adapter is of no use there."""
    path, module = next(iter(meant.items()))
    if path.startswith(_mixer_prefixes(student)):
        return path, "inside a mixer, which trains whole here: an adapter there would only be trained beside its own weight"
    if module is student.get_output_embeddings():
        return path, "the head, which train: all trains; its adapter would keep the fused loss from reading its weight"
    return path, f"of type {type(module).__name__}, and adapters stand on linear layers"


def _exist(known) -> str:
    return f" (linear layers outside the mixers: {', '.join(sorted(known))})"
