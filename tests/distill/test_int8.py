"""Teachers with int8 weights: students start from the original weights, and the loss by int8 is measured and kept."""

import io
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
import teachers
from distill.build import build
from distill.errors import UserError
from distill.evaluation.identity import check_identity
from distill.recipe_file import check
from students.config import Layout
from teachers.fingerprint import difference

MIXED = Layout.over(4, "AM", {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}})
installed = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (extra int8)")


@pytest.fixture
def pair(tiny_teacher):
    """The tiny teacher in bfloat16, and the same with int8 weights."""
    plain, narrow = (teachers.load(str(tiny_teacher), dtype=torch.bfloat16) for _ in range(2))
    narrow.quantise()
    return plain, narrow


def test_without_torchao(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("teachers.int8.find_spec", lambda name: None)
    recipe = check(tiny_recipe | {"teacher_dtype": "int8"}, "tiny.yaml")
    for verb in (lambda: distill.plan(recipe), lambda: distill.run(recipe, runs=tmp_path)):
        with pytest.raises(UserError, match=r"tiny: teacher_dtype is 'int8': .*pip install 'distill-hybrids\[int8\]'"):
            verb()
    assert not list(tmp_path.iterdir())


@installed
def test_linear_layers_alone_are_int8(pair):
    plain, narrow = pair
    kinds = {name for name, tensor in narrow.model.named_parameters() if type(tensor) is not nn.Parameter}
    assert kinds == {f"{name}.weight" for name, module in plain.model.named_modules() if type(module) is nn.Linear} - {
        "lm_head.weight"
    }
    ids = torch.randint(1, 320, (2, 16))
    wanted, found = (teacher.model(ids).logits.float() for teacher in pair)
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 0.05
    weights, read = plain.attention_weights(1), narrow.attention_weights(1)
    assert all(0 < (getattr(read, n) - getattr(weights, n)).norm() < 0.01 * getattr(weights, n).norm() for n in "qkvo")


@installed
def test_what_is_made_of_it_begins_with_the_numbers_as_they_were(pair):
    plain, narrow = pair
    assert narrow.fingerprint == plain.fingerprint
    narrow.check_account()
    one, other = (build(teacher, MIXED)[0] for teacher in pair)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    held = {tensor.data_ptr() for tensor in narrow.model.parameters() if type(tensor) is nn.Parameter}
    assert other.get_input_embeddings().weight.data_ptr() in held  # what is not quantised is still shared
    assert check_identity(narrow, MIXED)["logits"] == 0
    again = teachers.Teacher(
        "x", narrow.model, narrow.tokenizer, narrow.family, rounded=True, unquantised=narrow.unquantised
    )
    with again.as_it_was(), again.as_it_was():
        assert difference(again.fingerprint, plain.fingerprint) is None
    assert type(narrow.model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter  # and it is int8 again


@installed
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run(tiny_recipe, tmp_path, precision):
    tiny_recipe["stages"][-1]["imitate"]["train"] = "lora"
    tiny_recipe["evaluation"] |= {"passkey": [], "documents": 2}
    written = io.StringIO()
    recipe = check(tiny_recipe | {"teacher_dtype": "int8", "precision": precision}, "tiny.yaml")
    folder = distill.run(recipe, runs=tmp_path, console=Console(file=written, width=300))
    lost = folder.read("evaluations.json")["quantised"]
    assert 0 < lost["kl"] < 0.05 and 0.8 < lost["agreement"] <= 1 and lost["tokens"] >= 200
    said = f"in int8 the teacher's KL from itself in bfloat16 is {lost['kl']:.2g} nats a token"
    assert said in written.getvalue()
    assert folder.read("evaluations.json")["identity"]["logits"] == 0
