"""`distill doctor`: versions, devices, the implementation of each op on this machine, and missing packages."""

import importlib.util
from importlib import import_module

import torch
from rich.table import Table

from distill.runs.run_dir import versions
from distill.version import __version__
from students.kernels import TYPES
from students.kernels.fla import Kernel as FlaKernel
from students.kernels.op import folders
from teachers.cache import cache_folder

OPTIONAL = {
    "gguf": "GGUF teachers: pip install 'distill-hybrids[gguf]'",
    "lm_eval": "lm-evaluation-harness tasks: pip install 'distill-hybrids[eval]'",
    "torchao": "teacher_dtype: int8, and optimizer: adamw_8bit of stages: pip install 'distill-hybrids[int8]'",
    "fla": "faster gated DeltaNet and GLA on a GPU: pip install 'distill-hybrids[fla]'",
    "wandb": "a tracker: pip install 'distill-hybrids[trackers]'",
    "trackio": "a tracker: pip install 'distill-hybrids[trackers]'",
    "tensorboard": "a tracker: pip install 'distill-hybrids[trackers]'",
}


def table(found: dict[str, str]) -> Table:
    """A table of the findings, to print."""
    rows = Table(box=None, show_header=False)
    for name, value in found.items():
        rows.add_row(name, value)
    return rows


def findings() -> dict[str, str]:
    """The findings by name: versions, devices, the implementation of each op, the cache folder, missing packages."""
    found = {"distill": __version__, **versions()}
    found["devices"] = ", ".join(_devices())
    found["bfloat16"] = "on the GPU" if torch.cuda.is_available() else "in float32 on this CPU (precision: auto)"
    for op in folders():
        found[f"op {op}"] = _runs(op)
    found["cache"] = str(cache_folder())
    for package, purpose in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            found[f"missing {package}"] = purpose
    return found


def _runs(op: str) -> str:
    """The implementation that an op uses on this machine."""
    module = import_module(f"students.kernels.{op}")
    kernel = module.IMPLEMENTATIONS.get("triton")
    if kernel is None:
        return "reference (PyTorch)"
    if not torch.cuda.is_available():
        whose = "fla-core's kernel, if installed," if isinstance(kernel, FlaKernel) else "a Triton kernel"
        return f"reference (PyTorch); {whose} on a GPU"
    if kernel.missing() is not None:
        return f"reference (PyTorch): {kernel.missing()} is not installed"
    if isinstance(kernel, FlaKernel):
        return "fla-core's Triton kernel if it passes a check at its first call, else the reference (PyTorch)"
    checked = getattr(module, "CHECKED", {}).get(op, TYPES)
    types = ", ".join(str(kind).removeprefix("torch.") for kind in checked)
    return f"a Triton kernel in {types}, else the reference (PyTorch)"


def _devices() -> list[str]:
    gpus = [
        f"{torch.cuda.get_device_name(index)} ({torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
        for index in range(torch.cuda.device_count())
    ]
    return [*gpus, f"CPU with {torch.get_num_threads()} threads"]
