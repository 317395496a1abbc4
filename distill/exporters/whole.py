"""Checks of a student before its export: all tensors present, of the right shape and finite, and a tokenizer that loads.

transformers fills missing tensors with random numbers and ignores unknown ones, and an engine serves NaN without an error.
So names and shapes are checked against the model that config.json describes, which is built on the meta device, and values
are checked tensor by tensor.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.errors import UserError, reason_of, shown
from distill.exporters.source import Source
from distill.loading import check_student_files
from distill.memory import ran_out
from distill.stages.adapters import CONFIG as ADAPTED
from distill.stages.adapters import WEIGHTS as ADAPTER
from teachers import folder as files
from teachers.files import INDEX, WHOLE, weight_files
from teachers.quiet import no_bars_in_logs, no_warnings

AGAIN = "delete the student's folder, and the same `distill run` saves it again"
INSIDE = (
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    RecursionError,
)  # libraries' internal errors, whose text helps no user
FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
TOKENIZER = (*files.TOKENIZER, "tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
SETTINGS = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}  # tokenizer files without a vocabulary


def check_whole(student: Path) -> Source:
    """Refuse a damaged student.

    Returns:
        the description of it for export targets.

    Raises:
        UserError: naming the file and the tensor.
    """
    for path in sorted(student.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link, and an export holds only files of the student's folder; put the file there")
    check_student_files(student)
    if not (student / files.CONFIG).is_file():
        raise _damaged(student, f"there is no {files.CONFIG}")
    with _read(student), no_warnings():
        source = Source.read(student)
    held = dict(_shapes(student))
    with _read(student):
        model = _on_no_device(student)
    _check_names(student, *model, held)
    for file in weight_files(student):
        _check_numbers(student, file.name)
    _check_adapter(student, model[0])
    _check_tokenizer(student)
    return source


def _damaged(student: Path, said: str) -> UserError:
    return UserError(f"the student in {student} cannot be exported: {said}; {AGAIN}")


@contextmanager
def _read(student: Path) -> Iterator[None]:
    """Turn any error that libraries raise on damaged files inside the block into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        said = reason_of(error)
        if not said or isinstance(error, INSIDE):
            said = "its files were edited, and the entries of its config.json do not fit each other"
        raise _damaged(student, said) from error


def _shapes(student: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """Yield every tensor's name with the file that holds it and its shape.

    Raises:
        UserError: a file is cut short, holds integers, or does not match the index.
    """
    index = None
    if not (student / WHOLE).exists():
        index = json.loads((student / INDEX).read_text())["weight_map"]
    seen = {}
    for file in weight_files(student):
        with _opened(student, file.name) as opened:
            for name in opened.keys():  # noqa: SIM118, it is no mapping
                part = opened.get_slice(name)
                if not part.get_dtype().startswith(("F", "BF")) or part.get_dtype().startswith("F8"):
                    raise _damaged(
                        student, f"{file.name}: {name} holds {part.get_dtype()}, but weights are F32, BF16 or F16"
                    )
                if index is not None and index.get(name) != file.name:
                    raise _damaged(student, f"{file.name}: {name} is there, but by {INDEX} it is in {index.get(name)}")
                seen[name] = file.name
                yield name, (file.name, part.get_shape())
    for name, file in (index or {}).items():
        if name not in seen:
            raise _damaged(student, f"{file}: {name} is missing, but {INDEX} says that it is in this file")


@contextmanager
def _opened(student: Path, file: str) -> Iterator:
    try:
        with safe_open(student / file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError, EOFError) as error:
        raise _damaged(student, f"{file} is not a whole safetensors file ({reason_of(error)})") from error


def _on_no_device(student: Path) -> tuple[nn.Module, dict]:
    """Return config.json's model on the meta device, and transformers' report on loading the weights into it.

    The model is loaded from a folder with links to the config and the weights, because adapters are not part of it.
    """
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory(prefix="distill-") as place, no_bars_in_logs(), no_warnings():
        for name in (files.CONFIG, INDEX, *(file.name for file in weight_files(student))):
            if (student / name).exists():
                os.symlink((student / name).absolute(), Path(place) / name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, device_map="meta", use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
        return loaded


def _check_names(student: Path, model: nn.Module, info: dict, held: dict[str, tuple[str, list[int]]]) -> None:
    """Refuse tensors that are missing, of another shape, or unknown to the model."""
    first = weight_files(student)[0].name
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        file = held.get(name, (first,))[0]
        raise _damaged(
            student,
            f"{file}: {name} has the shape {list(found)}, but by config.json it is {list(wanted)}"
            f"{_others(mismatched)}; config and weights do not belong together",
        )
    if missing := sorted(info["missing_keys"]):
        where = first if len(weight_files(student)) == 1 else "all of its weight files"
        raise _damaged(student, f"{where} lacks {missing[0]}{_others(missing)}")
    unknown = sorted(info["unexpected_keys"])
    if unknown:
        file = held.get(unknown[0], (first,))[0]
        raise _damaged(
            student, f"{file}: {unknown[0]} is not a weight of the model that config.json describes{_others(unknown)}"
        )
    if info.get("error_msgs"):
        raise _damaged(student, shown(info["error_msgs"][0], 200))


def _others(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_numbers(student: Path, file: str) -> None:
    """Refuse tensors with NaN or infinity."""
    with _opened(student, file) as opened:
        for name in opened.keys():  # noqa: SIM118, it is no mapping
            tensor = opened.get_tensor(name)
            if not bool(tensor.isfinite().all()):
                count = int((~tensor.isfinite()).sum())
                raise _damaged(
                    student,
                    f"{file}: {name} has {count:,} values of {tensor.numel():,} that are not finite (NaN or infinite)",
                )


def _check_adapter(student: Path, model: nn.Module) -> None:
    """Refuse adapters that do not fit their layers: peft would ignore these without a warning."""
    if not (student / ADAPTED).exists():
        if (student / ADAPTER).exists():
            raise _damaged(student, f"{ADAPTER} is there, but no {ADAPTED}")
        return
    if not (student / ADAPTER).exists():
        raise _damaged(student, f"{ADAPTED} is there, but no {ADAPTER}")
    factors: dict[str, dict[str, Tensor]] = {}
    with _opened(student, ADAPTER) as opened:
        for name in opened.keys():  # noqa: SIM118, it is no mapping
            tensor = opened.get_tensor(name)
            if not bool(tensor.isfinite().all()):
                raise _damaged(student, f"{ADAPTER}: {name} has values that are not finite (NaN or infinite)")
            found = FACTOR.fullmatch(name)
            if not found:
                raise _damaged(student, f"{ADAPTER}: {name} is not a factor of a low-rank adapter")
            factors.setdefault(found[1], {})[found[2]] = tensor
    if not factors:
        raise _damaged(student, f"{ADAPTER} holds no adapter")
    for path, pair in factors.items():
        try:
            weight = cast(Tensor, model.get_submodule(path).weight)
        except AttributeError as error:
            raise _damaged(student, f"{ADAPTER}: {path} is not a layer of the student") from error
        if set(pair) != {"A", "B"}:
            raise _damaged(student, f"{ADAPTER}: {path} has one factor of an adapter, not both")
        sizes = sorted((pair["A"].shape[-1], pair["B"].shape[0]))
        if pair["A"].shape[0] != pair["B"].shape[-1] or sizes != sorted(weight.shape):
            raise _damaged(
                student,
                f"{ADAPTER}: the factors of {path} have the shapes {list(pair['A'].shape)} and {list(pair['B'].shape)}, "
                f"which do not fit its weight of {list(weight.shape)}",
            )


def _check_tokenizer(student: Path) -> None:
    """Refuse a student whose tokenizer is missing or cannot be loaded: whoever gets the export could not use it."""
    from transformers import AutoTokenizer

    fix = f"copy the teacher's tokenizer files there, or {AGAIN}"
    present = [name for name in TOKENIZER if (student / name).is_file()]
    if not set(present) - SETTINGS:
        raise UserError(
            f"the student in {student} cannot be exported: it has no tokenizer (no tokenizer.json, tokenizer.model or vocab "
            f"file); {fix}"
        )
    try:
        files.check_tokenizer_files(student)
        config = files.read_json(student / "tokenizer_config.json") if "tokenizer_config.json" in present else {}
        if "auto_map" not in config:  # a tokenizer with auto_map loads through its own code, which is not run here
            with no_warnings():
                AutoTokenizer.from_pretrained(student)
    except Exception as error:
        if ran_out(error):
            raise
        said = "its files do not fit each other" if isinstance(error, INSIDE) else reason_of(error)
        raise UserError(
            f"the tokenizer in {student} cannot be loaded ({said}), so the student is not exported; {fix}"
        ) from error
