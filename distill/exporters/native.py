"""The native target: a folder that transformers' own classes load without custom code, and that vLLM and MLX serve."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.exporters.containers import fitting
from distill.exporters.engines import ENGINES, Preparation
from distill.exporters.gguf import Gguf
from distill.exporters.target import Form, Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.exporters.containers.container import Container
    from distill.exporters.source import Source

SAMPLE = "In 1969 the café's \n\n\tclock said 12:34, didn't it? 东京 नमस्ते <|im_end|> </s> def f(x): return x**2"
LEFT_BEHIND = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_*", "*.py", "README.md")


class Native(Target):
    """The native target, for students that one of transformers' own classes computes exactly."""

    line = "a folder for one of transformers' own classes, which vLLM and MLX serve; refused where no class is exact"

    def refuses(self, source: "Source") -> str | None:
        found = fitting(source)
        if found.container:
            return None
        return ", ".join(f"{name} ({'; '.join(why)})" for name, why in found.reasons.items()) or "no container is known"

    def since(self, source: "Source") -> str | None:
        container = fitting(source).container
        return None if container is None else container.since(source)

    def engines(self, source: "Source") -> dict[str, str | None]:
        container = fitting(source).container
        if container is None:
            return dict.fromkeys(ENGINES, "no container")
        asked = container.engines(source) | {"llama.cpp": Gguf().refuses(source) or "it reads GGUF: export to gguf"}
        return {engine: asked[engine] for engine in ENGINES}

    def preparations(self, source: "Source") -> Mapping[str, Preparation]:
        container = fitting(source).container
        return {} if container is None else container.preparations

    def rehearse(self, student: Path, out: Path, form: Form) -> None:
        _begin(student, out, form)

    def write(self, student: Path, out: Path, form: Form) -> None:
        import torch

        from distill.exporters.saved import SavedTensors, write_weights
        from distill.stages import adapters

        begun, asked = _begin(student, out, form), getattr(torch, form.dtype)
        merged = adapters.merged_copy(student, out / ".merged")
        saved = SavedTensors(merged)
        _check_whole(saved, begun.student)
        write_weights(
            out,
            begun.container.tensors(begun.source, saved),
            {name: tensor.shape for name, tensor in begun.tensors.items()},
            lambda name: torch.float32 if begun.container.float32(name) else asked,
        )
        if merged != student:
            del saved
            shutil.rmtree(merged)


@dataclass(frozen=True)
class _Begun:
    """An export folder that is complete except for its weights.

    student, tensors: the student's and the container's tensors by name, on the meta device.
    """

    source: "Source"
    container: "Container"
    student: "Mapping[str, Tensor]"
    tensors: "Mapping[str, Tensor]"


def _begin(student: Path, out: Path, form: Form) -> _Begun:
    """Write everything but the weights, and check the weights' names and shapes against the class that will load them.

    Raises:
        ValueError: no container is exact, or a tensor or the tokenizer does not fit.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill.exporters.source import Source

    source = Source.read(student)
    container = fitting(source).container
    if container is None:
        raise ValueError(f"native cannot hold this student: {Native().refuses(source)}")
    shutil.copytree(student, out, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    entries = container.config(source) | {"dtype": form.dtype, "transformers_version": transformers.__version__}
    (out / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    for name, text in container.files(source).items():
        (out / name).write_text(text)
    with torch.device("meta"):
        ours = _own_tensors(AutoModelForCausalLM.from_config(source.config))
        theirs = _own_tensors(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out)))
        made = dict(container.tensors(source, ours))
    _check_same(container, made, theirs)
    _check_tokenizer(student, out)
    return _Begun(source, container, ours, made)


def _own_tensors(model: "nn.Module") -> "dict[str, Tensor]":
    """Return a model's tensors by name, each tied tensor once."""
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found[name] = tensor.detach()
        seen.add(id(tensor))
    return found


def _check_same(container: "Container", made: "Mapping[str, Tensor]", theirs: "Mapping[str, Tensor]") -> None:
    """Refuse tensors whose names or shapes differ from those of the class.

    Raises:
        ValueError: naming the tensor.
    """
    found = {container.name_inside(name): tensor for name, tensor in made.items()}
    for name in sorted(found.keys() ^ theirs.keys()):
        raise ValueError(f"{container.name} {'has no' if name in found else 'needs a'} tensor {name}")
    for name, tensor in found.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(f"{name} has shape {[*tensor.shape]}, but {container.name} needs {[*theirs[name].shape]}")


def _check_whole(saved, expected: "Mapping[str, Tensor]") -> None:
    """Refuse a student whose weight files hold other tensors than its config.json describes.

    Raises:
        ValueError: naming the tensor.
    """
    for name in sorted(saved.keys() ^ expected.keys()):
        raise ValueError(f"its weights {'hold an unknown' if name in saved else 'lack the'} tensor {name}")
    for name, tensor in expected.items():
        if saved.shape(name) != tuple(tensor.shape):
            raise ValueError(f"its tensor {name} has shape {[*saved.shape(name)]}, but config.json says {[*tensor.shape]}")


def _check_tokenizer(student: Path, out: Path) -> None:
    """Refuse an export whose tokenizer differs from the student's: transformers also chooses its class by model type.

    Raises:
        ValueError: the two tokenize a sample differently.
    """
    from transformers import AutoTokenizer

    if not (student / "tokenizer_config.json").exists():
        return
    before, behind = (AutoTokenizer.from_pretrained(folder)(SAMPLE).input_ids for folder in (student, out))
    if before != behind:
        raise ValueError(f"its tokenizer gives other tokens with this config.json: {behind[:8]}, not {before[:8]} ...")
