"""The gguf target: one file for llama.cpp, and for programs built on it such as Ollama and LM Studio.

The file holds the tensors of the transformers class that computes the same function as the student (`containers`), with
llama.cpp's names and order (`gguf_files`). It also holds the tokenizer, the chat template and the tokens that end a turn.
Matrices are float16, or float32 where that is asked for or a value is beyond float16's range; all other tensors are float32.
With `quantize`, llama.cpp's own quantiser makes the file from the float16 file, which is then deleted.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill.exporters.containers import fitting
from distill.exporters.engines import ENGINES
from distill.exporters.target import Form, Target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from distill.exporters.containers.container import Container
    from distill.exporters.gguf_files.architecture import Architecture
    from distill.exporters.source import Source

ELSEWHERE = "it does not read this model from GGUF; export to native for it"
WRITTEN = {"float32": "F32", "bfloat16": "F16"}  # a file is float16 unless float32 is asked for


class Gguf(Target):
    """The gguf target, for students with an exact container that llama.cpp has an architecture for."""

    line = "one file for llama.cpp, float16 or quantised; refused where llama.cpp has no exact architecture"
    quantizations = ("q8_0", "q4_k_m")

    def refuses(self, source: "Source") -> str | None:
        found = fitting(source)
        if found.container is None:
            reasons = found.reasons.items()
            return "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons) or "no container is known"
        architecture = _architecture(found.container.name)
        if architecture is None:
            return f"{found.container.name}: llama.cpp has no architecture for it"
        why = architecture.reasons(_config(found.container.config(source))) + found.container.gguf_reasons(source)
        return f"{found.container.name}: {', '.join(why)}" if why else None

    def engines(self, source: "Source") -> dict[str, str | None]:
        return {engine: self.refuses(source) if engine == "llama.cpp" else ELSEWHERE for engine in ENGINES}

    def check_installed(self) -> None:
        from distill.exporters.gguf_files.writing import check_installed

        check_installed()

    def types(self, form: Form) -> str:
        return form.quantize or ("float32" if form.dtype == "float32" else "float16")

    def rehearse(self, student: Path, out: Path, form: Form) -> None:
        _Export.of(student, form)

    def write(self, student: Path, out: Path, form: Form) -> None:
        import shutil

        from distill.exporters.gguf_files.quantising import quantise
        from distill.exporters.saved import SavedTensors
        from distill.stages import adapters

        export = _Export.of(student, form)
        out.mkdir(parents=True)
        merged = adapters.merged_copy(student, out / ".merged")
        path = out / f"{export.name}-{WRITTEN[form.dtype]}.gguf"
        export.write(SavedTensors(merged), path, form)
        if merged != student:
            shutil.rmtree(merged)
        if form.quantize:
            quantise(path, out / f"{export.name}-{form.quantize.upper()}.gguf", form.quantize, form.quantiser)
            path.unlink()


class _Export:
    """A GGUF file before its tensors are written: the source, the architecture, the config and the metadata."""

    def __init__(self, source: "Source", architecture: "Architecture", config: "PretrainedConfig") -> None:
        self.source, self.architecture, self.config = source, architecture, config
        self.name = ""
        self.entries: dict[str, Any] = {}

    @classmethod
    def of(cls, student: Path, form: Form) -> "_Export":
        """Prepare the file of a student's folder.

        Raises:
            UserError: the package gguf, or the quantiser that is asked for, is not installed. ValueError: the target
            cannot hold the student, or llama.cpp does not have its tokenizer.
        """
        from distill.exporters.gguf_files.quantising import command
        from distill.exporters.source import Source

        Gguf().check_installed()
        if form.quantize:
            command(student, student, form.quantize, form.quantiser)
        source = Source.read(student)
        if why := Gguf().refuses(source):
            raise ValueError(f"gguf cannot hold this student: {why}")
        container = cast("Container", fitting(source).container)
        found = cls(source, cast("Architecture", _architecture(container.name)), _config(container.config(source)))
        found.name = _name(student)
        found.entries = found._entries(student)
        return found

    def _entries(self, student: Path) -> dict[str, Any]:
        from distill.exporters.gguf_files.vocabulary import vocabulary

        model = {f"{self.architecture.name}.{name}": value for name, value in self.architecture.entries(self.config).items()}
        words = vocabulary(_tokenizer(student), self.config.vocab_size, _ends(student))
        return {"general.type": "model", "general.name": self.name} | model | words

    def write(self, student, path: Path, form: Form) -> None:
        """Write the file.

        Args:
            student: the student's tensors by name.

        Raises:
            ValueError: the tensors differ from the config, or are not finite. OSError: the file cannot be written.
        """
        import torch

        from distill.exporters.gguf_files.writing import write_file

        container = cast("Container", fitting(self.source).container)
        tensors = container.tensors(self.source, student)
        write_file(
            path,
            self.architecture.name,
            self.entries,
            lambda: self.architecture.tensors(self.config, tensors),
            torch.float32 if form.dtype == "float32" else torch.float16,
            self.architecture.float32,
        )


def _architecture(container: str) -> "Architecture | None":
    from distill.exporters.gguf_files import architecture_of

    return architecture_of(container)


def _config(entries: dict[str, Any]) -> "PretrainedConfig":
    """Return a container's config (its text model's, if it has several) with its class's defaults filled in."""
    from transformers import AutoConfig

    entries = entries.get("text_config", entries)
    given = {name: value for name, value in entries.items() if name not in ("model_type", "architectures")}
    return AutoConfig.for_model(entries["model_type"], **given)


def _name(student: Path) -> str:
    """Name the model after its run folder, or after its own folder outside a run."""
    folder = student.resolve()
    found = folder.parent.name if folder.name == "student" else folder.name
    return re.sub(r"[^\w.+-]+", "-", found) or "student"


def _tokenizer(student: Path):
    """Load the tokenizer from tokenizer.json alone, without the class that the model type would choose.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from transformers import PreTrainedTokenizerFast

    if not (student / "tokenizer.json").exists():
        raise ValueError("it has no tokenizer.json, and a GGUF file must hold the tokenizer")
    try:
        return PreTrainedTokenizerFast.from_pretrained(student)
    except Exception as error:  # the tokenizers library raises its own types
        raise ValueError(f"its tokenizer.json is damaged: {error}") from error


def _ends(student: Path) -> list[int]:
    """Return the ids of the tokens that end a generation."""
    from transformers import GenerationConfig

    if not (student / "generation_config.json").exists():
        return []
    ends = GenerationConfig.from_pretrained(student).eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
