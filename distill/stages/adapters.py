"""Low-rank adapters (LoRA, arXiv 2106.09685) on a student's backbone, through peft: choosing, adding, merging, saving.

Adapters go on the backbone's linear layers (nn.Linear, and GPT-2's Conv1D, which is a linear layer too). Two places are
refused by name. Mixers are trained whole, so an adapter inside one would be trained in addition to the weight itself. An
adapter on the head would keep the fused loss from reading the head's weight. These limits hold for training with this
package only: peft can put adapters on any layer of a finished student.
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

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's file names


def linear_layers(student: Student) -> dict[str, nn.Module]:
    """The linear layers that can have adapters, by name: all outside the mixers except the head."""
    inside, head = _mixer_prefixes(student), student.get_output_embeddings()
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.startswith(inside) and module is not head
    }


def targets(student: Student, wanted: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linear layers that the given names match; all of them for None.

    Args:
        wanted: whole names of modules or their last parts ("mlp.up_proj", "up_proj"). Matches inside mixers are ignored,
            because mixers are trained whole.

    Raises:
        ValueError: a name matches no module, or only modules that cannot have an adapter; the message lists those that can.
    """
    linear = linear_layers(student)
    if wanted is None:
        if not linear:
            raise ValueError("train: lora finds no linear layer outside the mixers and the head; use train: mixers")
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
    """The number of parameters of adapters of this rank on these layers."""
    return sum(rank * sum(_weight(module).shape) for module in linear.values())


def _weight(linear: nn.Module) -> Tensor:
    return cast(Tensor, linear.weight)


def check_rank(linear: dict[str, nn.Module], rank: int) -> None:
    """Refuse a rank that is larger than one of the layers allows.

    Raises:
        ValueError: naming the narrowest layer.
    """
    narrowest = min(linear, key=lambda name: min(_weight(linear[name]).shape))
    width = min(_weight(linear[narrowest]).shape)
    if rank > width:
        raise ValueError(f"lora.rank is {rank}, but {narrowest} has no more than rank {width}; make it {width} or less")


def add(student: Student, names: Sequence[str], rank: int, alpha: float) -> None:
    """Put adapters on linear layers, in place. Their B is zero, so the student's outputs do not change."""
    from peft import LoraConfig, inject_adapter_in_model

    gpt2 = any(isinstance(student.get_submodule(name), Conv1D) for name in names)  # weights stored the other way round
    config = LoraConfig(r=rank, lora_alpha=cast(Any, alpha), target_modules=list(names), fan_in_fan_out=gpt2)
    with torch.random.fork_rng():  # every process of a run must draw the same; they share a seed but not the random state
        torch.manual_seed(torch.initial_seed())
        inject_adapter_in_model(config, student)


def adapted(student: Student) -> dict[str, Any]:
    """The layers that have adapters, by name; `get_base_layer()` of each gives the layer without its adapter."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in student.named_modules() if isinstance(module, LoraLayer)}


def merge(student: Student) -> None:
    """Merge every adapter into the weight below it and remove it.

    Each such weight gets its own float32 memory first, because untrained weights of a student lie in the teacher's."""
    for name, layer in adapted(student).items():
        base = layer.get_base_layer()
        own(base.weight)
        layer.merge()
        student.set_submodule(name, base)
    join_types(student)
    _forget(student)


def save(student: Student, folder: Path) -> None:
    """Write a student in the format of transformers, and its adapters in peft's format in the same folder.

    transformers loads the adapters with the student where both are in one folder; peft can load them onto the weights.
    Every tensor keeps its type: float32 for what was trained, the teacher's type for the rest. config.json names the widest
    type, which every tensor gets on loading, so no trained tensor is rounded.
    """
    layers = adapted(student)
    if layers:
        _save_adapters(student, folder)
    with _without(student, layers):
        student.save_pretrained(folder)
        if student.dtype != (widest := widest_type(student)):  # transformers writes the type of the first weight
            student.config.dtype = widest
            student.config.save_pretrained(folder)


def merge_saved(folder: Path) -> None:
    """Merge the adapters of a saved student into its weights, in place and in float32. Without adapters, do nothing."""
    if not (folder / CONFIG).exists():
        return
    from peft import PeftModel

    import students

    aside = folder / ".adapters"  # out of sight: transformers would load them itself and then save nothing but adapters
    aside.mkdir()
    for file in folder.glob("adapter_*"):
        file.rename(aside / file.name)
    PeftModel.from_pretrained(students.load(folder, dtype=torch.float32), aside).merge_and_unload().save_pretrained(folder)
    shutil.rmtree(aside)


def merged_copy(folder: Path, out: Path) -> Path:
    """The folder of a saved student without adapters: `folder` itself if it has none, else `out`.

    `out` is a copy with the adapters merged; it is made unless it exists."""
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
    """Put the layers without adapters in place of the adapted ones while the block runs."""
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
    """The first of the modules that a name matches, and why it cannot have an adapter."""
    path, module = next(iter(meant.items()))
    if path.startswith(_mixer_prefixes(student)):
        return path, "inside a mixer, which is trained whole: an adapter would only be trained in addition to its weight"
    if module is student.get_output_embeddings():
        return path, "the head, whose adapter would keep the fused loss from reading its weight; train: all trains the head"
    return path, f"of type {type(module).__name__}, and adapters go on linear layers only"


def _exist(known) -> str:
    return f" (linear layers outside the mixers: {', '.join(sorted(known))})"
