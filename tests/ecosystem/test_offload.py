"""accelerate: layers on disk, or in memory that is copied from for each call, compute what they compute in place."""

import accelerate
import pytest
import torch

import students
from distill.output_head import head_of
from students.kernels.linear_kl import linear_kl
from tests.ecosystem.conftest import every_layout

pytestmark = pytest.mark.ecosystem


def places(student, which):
    """A device map: the layers of `which` (or, with None, all that has weights) on disk."""
    modules = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    modules += ["meta_tokens"] if student.meta_tokens is not None else []
    layers = [f"model.layers.{layer}" for layer in range(4)]
    on_disk = {*modules, *layers} if which is None else {layers[layer] for layer in which}
    return {name: "disk" if name in on_disk else "cpu" for name in (*modules, *layers)}


def from_disk(which):
    def offload(student, folder):
        student.save_pretrained(folder / "student")
        return students.load(folder / "student", device_map=places(student, which), offload_folder=folder / "offload")

    return offload


WAYS = {
    "some layers on disk": from_disk((1, 2)),
    "all on disk": from_disk(None),
    "cpu_offload": lambda student, folder: accelerate.cpu_offload(student, execution_device="cpu"),
    "disk_offload": lambda student, folder: accelerate.disk_offload(student, folder / "offload", execution_device="cpu"),
}


@every_layout
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_offloaded_layers_compute_the_same(student, way, ids, same, tmp_path):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted, said = student(ids).logits, student.generate(ids, **options)
    hidden, plain = student.hidden(ids, None).flatten(0, 1), head_of(student)._replace()
    plain = plain._replace(weight=plain.weight.clone())
    model = WAYS[way](student, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        same(model(ids).logits, wanted, 1e-5)
    assert torch.equal(model.generate(ids, **options), said)
    loss = linear_kl(hidden, head_of(model), hidden, plain, torch.ones(len(hidden)))
    assert loss.abs() < 1e-6
    assert any(parameter.is_meta for parameter in model.parameters())  # and they are taken away again


@pytest.mark.parametrize("layout", ["Hymba", "mamba2 behind windows"])
@torch.no_grad()
def test_a_decoder_runs_an_offloaded_student(student, ids, same, tmp_path):
    cache = student.new_cache()
    student(ids[:, :9], past_key_values=cache)
    wanted = student(ids).logits[:, 9:]
    model = WAYS["disk_offload"](student, tmp_path)
    decoder = students.Decoder(model, cache, tokens=4)
    same(torch.stack([decoder(ids[:, at : at + 1]) for at in range(9, 13)], 1), wanted, 1e-3)
    decoder.release()
