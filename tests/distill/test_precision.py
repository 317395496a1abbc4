"""Teachers held in bfloat16: every stage, every mixer and both precisions, and float32 masters of what trains."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import distill
import students
import teachers
from distill.build import build, layout_of
from distill.recipe_file import check
from students.mixers import MIXERS

QUIET = Console(file=io.StringIO())


def made(entries, place, **changes):
    return distill.run(check(entries | changes, "tiny.yaml"), runs=place, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", ["mixers", "mixers+norms", "all", "lora"])
def test_a_run(tiny_recipe, tmp_path, precision, train):
    tiny_recipe["stages"][-1]["imitate"]["train"] = train
    folder = made(tiny_recipe, tmp_path, teacher_dtype="bfloat16", precision=precision, twin=True, export=["portable"])
    saved = load_file(folder.student / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in saved.items()}
    assert all(kind == torch.float32 for name, kind in kinds.items() if ".mixer." in name)
    assert kinds["model.layers.0.input_layernorm.weight"] == (torch.float32 if "norms" in train or train == "all" else torch.bfloat16)
    assert json.loads((folder.student / "config.json").read_text())["dtype"] == "float32"
