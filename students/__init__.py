"""Hybrid students: models, mixers and kernels. This package alone loads and runs a student.

After `import students`, `transformers.AutoModelForCausalLM.from_pretrained` loads a student's folder too.
"""

from pathlib import Path
from typing import Any

from students.config import Layout, Place, Shapes
from students.decoding import Decoder
from students.generation import replayed
from students.mixers.mixer import Shape
from students.model import build, register_families
from students.prompts import prefill
from students.skeleton import Student
from students.static_cache import GraphError

__all__ = ["Decoder", "GraphError", "Layout", "Place", "Shape", "Shapes", "build", "load", "prefill", "replayed"]

register_families()


def load(path: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Student:
    """Load a student from a folder or a hub id; `options` go to transformers' `from_pretrained` (dtype, device_map ...).

    The student is built from the classes of this package. Code in the folder runs only with `trust_remote_code`, and nothing
    is unpickled.

    Args:
        trust_remote_code: run the folder's own code, for a model type that this version does not know.

    Raises:
        ValueError: the folder holds no student made by distill, or weights that are missing, of a wrong shape or not
            finite.
    """
    from transformers import AutoModelForCausalLM

    usual = {"use_safetensors": True} | ({} if "quantization_config" in options else {"ignore_mismatched_sizes": True})
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, trust_remote_code=trust_remote_code, **usual | options
    )
    model, info = loaded
    if not hasattr(model, "layout"):
        raise ValueError(f"{path} holds a {type(model).__name__}, not a student made by distill")
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random
        raise ValueError(f"{path} has no weights for {missing[0]} ({len(missing)} missing in all): it is incomplete")
    if mismatched := sorted(info["mismatched_keys"]):  # these too
        name, found, wanted = mismatched[0]
        raise ValueError(
            f"{path}: {name} has the shape {list(found)}, but by config.json it is {list(wanted)}; config and weights do "
            "not belong together"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.is_meta and tensor.itemsize > 1 and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path} has weights that are not finite (NaN or infinite), the first in {name}")
    return model
