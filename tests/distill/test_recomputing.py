"""Activation checkpointing: layers recomputed in the backward pass, wholly or without their products, change no gradient."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from distill.errors import UserError
from distill.recipe_file import check
from distill.stages.imitate import Imitate
from distill.stages.recomputing import policy
from tests.distill.stage_steps import batch
from tests.ecosystem.layouts import LAYOUTS, student_of

aten = torch.ops.aten


def gradients(teacher, layout, train, recomputed):
    torch.manual_seed(5)
    options = {"hidden": 0.5} if train == "lora" else {}
    stage = Imitate(
        teacher,
        student_of(teacher, layout),
        Imitate.Options(tokens=1, lr=1e-3, train=train, activation_checkpointing=recomputed, **options),
    )
    stage.prepare()
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ((_, loss),) = stage.losses(batch(2, 16))
    held = sum({storage.data_ptr(): storage.nbytes() for storage in saved}.values())
    loss.backward()
    found = {name: parameter.grad.clone() for name, (_, parameter) in stage.trained().items() if parameter.grad is not None}
    stage.finish(lambda tokens: iter(()))
    return found, held


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_without(teacher, layout):
    wanted, everything = gradients(teacher, layout, "all", False)
    for recomputed in (True, "selective"):
        found, held = gradients(teacher, layout, "all", recomputed)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
        assert held < 0.75 * everything  # of the hooks' account, which products that are kept stand beside


@pytest.mark.parametrize("train", ["mixers", "mixers+norms", "lora"])
def test_gradients_of_what_trains_are_those_without(teacher, train):
    wanted, _ = gradients(teacher, "Hymba", train, False)
    found, _ = gradients(teacher, "Hymba", train, "selective")
    assert found.keys() == wanted.keys() and len(wanted) > 4
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_backward_pass_computes_no_product_of_a_layer_again(teacher):
    """Counted: forward and backward of a layer's products without recomputation, with it, and with the selective one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
            self.count += op is aten.mm.default
            return op(*arguments, **(keywords or {}))

    counts = {}
    for recomputed in (False, True, "selective"):
        torch.manual_seed(5)
        options = Imitate.Options(tokens=1, lr=1e-3, activation_checkpointing=recomputed)
        stage = Imitate(teacher, student_of(teacher, "nothing swapped"), options)
        stage.prepare()
        with Products() as seen:
            for _, loss in stage.losses(batch(2, 16)):
                loss.backward()
        counts[recomputed] = seen.count
    assert counts["selective"] == counts[False] < counts[True]


def test_what_is_kept():
    tall, wide, small = torch.ones(2, 64, 8), torch.ones(2, 8, 64), torch.ones(2, 8, 8)
    kept = CheckpointPolicy.MUST_SAVE
    assert policy(None, aten.mm.default, tall[0], wide[0]) == kept
    assert policy(None, aten.addmm.default, tall[0][0], tall[0], wide[0]) == kept
    assert policy(None, aten.bmm.default, tall, small) == kept
    assert policy(None, aten.bmm.default, tall, wide) != kept  # scores of 64 tokens for each other
    assert policy(None, aten.baddbmm.default, tall[:, :, :1], tall, wide) != kept
    assert policy(None, aten._scaled_dot_product_flash_attention.default, tall, tall, tall) == kept
    assert policy(None, aten._scaled_dot_product_efficient_attention.default, tall, tall, tall) == kept
    assert policy(None, aten.mul.Tensor, tall, tall) != kept


@pytest.mark.parametrize("value", ["sometimes", 1, None])
def test_other_words_are_refused(tiny_recipe, value):
    tiny_recipe["stages"][3]["imitate"]["activation_checkpointing"] = value
    with pytest.raises(UserError, match=f"activation_checkpointing is {value!r}: .*true or false.*selective"):
        check(tiny_recipe, "tiny.yaml")
