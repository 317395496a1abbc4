"""Checks for checkpoints that are not a plain model: adapters in the folder or in the weights, and quantised weights.

They are refused, with a message that says what to load instead: transformers would load them differently than a student.
"""

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from transformers import PretrainedConfig

from teachers.files import Stored, folder_of, stored_tensors

MERGE = "merge it (peft's merge_and_unload, then save_pretrained), or remove it"
CONFIG = "adapter_config.json"  # peft's; transformers loads the adapter that lies next to it into the model
ADAPTER_FILES = (  # of peft, its predecessors, diffusers and MLX
    CONFIG,
    *("adapter_model.safetensors", "adapter_model.bin", "pytorch_adapter.bin"),
    *("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapters.safetensors", "adapters.npz"),
)
# Parts of tensor names: those of peft's methods, and those of quantised formats.
ADAPTER_PARTS = (
    *("lora_", "ia3_l", "hada_w", "lokr_w", "vera_lambda", "oft_r", "boft_", "hra_u", "fourierft_", "prompt_embeddings"),
    *(".base_layer.", ".original_module.", ".modules_to_save."),
)
QUANTISED_PARTS = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".absmax", ".quant_map", ".nested_", ".quant_state"),
    *(".weight_scale", ".input_scale", ".activation_scale", ".weight_packed", ".weight_zero_point", ".weight_g_idx"),
    *("_blocks", "_scales", "._data", ".W_q", ".codebooks", ".qscale_"),
)
PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
READABLE = PLAIN | {"F8_E4M3", "F8_E5M2"}  # float8 without separate scales holds plain values
# Suffixes that publishers of quantised models add to a model's name.
SUFFIX = re.compile(
    r"([-_.](gptq|awq|bnb|exl[23]|hqq|aqlm|quip|eetq|quanto|torchao|fp8|nvfp4|mxfp4|int[48]|w\d+a\d+|[48]bit|[48]-bit|g\d+"
    r"|unsloth|dynamic|quantized|marlin|gguf))+$",
    re.IGNORECASE,
)


def check_adapter_files(reference: str, location: str) -> None:
    """Refuse a model's folder that also holds an adapter: transformers would load it into the teacher unasked.

    Raises:
        ValueError: naming the file.
    """
    folder = folder_of(location)
    for name in ADAPTER_FILES:
        if folder is not None and (folder / name).is_file():
            raise ValueError(f"teacher {reference!r} has an adapter beside it: {folder / name}; {MERGE}")


def plain_config(reference: str, config: PretrainedConfig, location: str) -> None:
    """Refuse a config that says that the weights are quantised.

    If the folder's weights are plain all the same, as after quantisation-aware training, the config's entry is removed.

    Raises:
        ValueError: naming the method and what to load instead.
    """
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        return
    stored = stored_tensors(location) if Path(location).is_dir() else None
    if stored and all(one.dtype in PLAIN for one in stored.values()) and not _with(QUANTISED_PARTS, stored):
        del config.quantization_config
        return
    entries = entry if isinstance(entry, Mapping) else entry.to_dict()
    method = entries.get("quant_method") or "bitsandbytes"  # old bitsandbytes configs have no quant_method
    raise ValueError(
        f"teacher {reference!r} is quantised by {getattr(method, 'value', method)} (quantization_config in its config.json)"
        f"; {instead(reference, location)}"
    )


def check_tensors(reference: str, location: str, stored: Mapping[str, Stored], homeless: Iterable[str]) -> None:
    """Refuse files that hold an adapter's tensors, or quantised weights.

    Args:
        stored: the files' tensors that the model loads. homeless: names of tensors that the model has no place for and that
            the user did not name in `ignore`.

    Raises:
        ValueError: naming the first of them.
    """
    homeless = sorted(homeless)
    if found := _with(ADAPTER_PARTS, homeless):
        raise ValueError(f"teacher {reference!r} has an adapter in its weights: {found[0]}; {MERGE}")
    if found := _with(QUANTISED_PARTS, homeless):
        raise ValueError(
            f"teacher {reference!r} has quantised weights: the model has no place for {found[0]} of its files; "
            f"{instead(reference, location)}"
        )
    for name, tensor in stored.items():
        if name.endswith(("weight", "bias")) and tensor.dtype not in READABLE:
            raise ValueError(
                f"teacher {reference!r} has quantised weights: {name} is stored as {tensor.dtype}; "
                f"{instead(reference, location)}"
            )


def instead(reference: str, location: str) -> str:
    """Returns the part of a message that says what to load instead of a quantised model."""
    origin = _origin(reference, location)
    named = f" ({origin}, by its name)" if origin else ""
    return f"load the model that it was made from{named}, or a GGUF file of it, which is read as plain weights"


def base_of_adapter(folder: Path) -> str | None:
    """Returns the name of the model that a folder's adapter belongs to; None if there is no adapter."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        return json.loads((folder / CONFIG).read_text()).get("base_model_name_or_path") or "its model"
    except ValueError:
        return "its model"


def _origin(reference: str, location: str) -> str | None:
    """Returns the model that a quantised one was made from, by its model card or else its own name; None if unknown."""
    folder = folder_of(location)
    card = folder / "README.md" if folder else None
    if card is not None and card.is_file():
        said = re.search(
            r"^base_model:[ \t]*(?:\n\s*-[ \t]*)?[\"']?([\w./-]+)", card.read_text(errors="replace"), re.MULTILINE
        )
        if said:
            return said[1]
    own = Path(reference).name if folder is not None and Path(reference).is_dir() else reference
    name = SUFFIX.sub("", own)
    return name if name != own else None


def _with(parts: Iterable[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, f"*{part}*") for part in parts)]
