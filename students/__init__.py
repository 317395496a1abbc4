"""Hybrid students: their mixers, their kernels, and the models they sit in. Enough alone to load and run a student.

After `import students`, `transformers.AutoModelForCausalLM.from_pretrained` loads a student's folder too.
"""

from pathlib import Path

from students.config import Layout, Place, Shapes
from students.mixers.mixer import Shape
from students.model import build, register_families

__all__ = ["Layout", "Place", "Shape", "Shapes", "build", "load"]

register_families()


def load(path: str | Path, **options):
    """Load a student from a folder or a hub id; `options` go to transformers' `from_pretrained` (dtype, device_map ...).

    Raises:
        ValueError: what lies there is not a student of ours.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if not hasattr(model, "layout"):
        raise ValueError(f"{path} holds a {type(model).__name__}, not a student made by distill")
    return model
