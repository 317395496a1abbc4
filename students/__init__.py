"""Hybrid students: their mixers, their kernels, and the models they sit in. Enough alone to load and run a student.

After `import students`, `transformers.AutoModelForCausalLM.from_pretrained` loads a student's folder too.
"""

from pathlib import Path

from students.config import Layout, Place, Shapes
from students.decoding import Decoder
from students.generation import replayed
from students.mixers.mixer import Shape
from students.model import build, register_families
from students.prompts import prefill
from students.static_cache import GraphError

__all__ = ["Decoder", "GraphError", "Layout", "Place", "Shape", "Shapes", "build", "load", "prefill", "replayed"]

register_families()


def load(path: str | Path, **options):
    """Load a student from a folder or a hub id; `options` go to transformers' `from_pretrained` (dtype, device_map ...).

    Raises:
        ValueError: what lies there is not a student of ours, or lacks some of its weights.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    if not hasattr(model, "layout"):
        raise ValueError(f"{path} holds a {type(model).__name__}, not a student made by distill")
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random
        raise ValueError(f"{path} has no weights for {missing[0]} ({len(missing)} missing in all); its files are not whole")
    return model
