"""Losses of `imitate` on the hidden states of chosen layers."""

import pytest
import torch

import distill
import teachers
from distill.build import build
from distill.errors import UserError
from distill.recipe_file import load
from distill.stages.imitate import Imitate
from distill.text.windows import Batch
from students.config import Layout
from tests.distill.two_documents import MIXER, text


def by_hand(teacher, student, batch, layers):
    """The mean relative squared error of the last hidden state and of some layers, from transformers' own outputs."""
    theirs = teacher.model.model(
        input_ids=batch.ids, position_ids=batch.positions, use_cache=False, output_hidden_states=True
    ).hidden_states
    found = []
    with torch.no_grad():
        kept = {}

        def keep(layer):
            def hook(module, arguments, output):
                kept[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [layer.register_forward_hook(keep(n)) for n, layer in enumerate(student.model.layers)]
        last = student.hidden(batch.ids, batch.documents)
        for hook in hooks:
            hook.remove()
        for ours, wanted in [(last, theirs[-1]), *((kept[n], theirs[n + 1]) for n in layers)]:
            error = (ours - wanted).square().sum(-1) / wanted.square().sum(-1)
            found.append((error * batch.weights).sum() / batch.weights.sum())
    return sum(found) / len(found)


@pytest.mark.parametrize("layers", [[], [1], [0, 2]])
def test_errors_of_layers(teacher, layers):
    student, _ = build(teacher, Layout.over(4, "AM", {"M": MIXER}))
    batch = text()
    options = {"tokens": 1, "lr": 1.0}
    plain = next(iter(Imitate(teacher, student, Imitate.Options(**options)).losses(batch)))[1]
    both = Imitate(teacher, student, Imitate.Options(**options, hidden=0.5, hidden_layers=layers))
    with torch.no_grad():
        found = (next(iter(both.losses(batch)))[1] - plain) / 0.5
    torch.testing.assert_close(found, by_hand(teacher, student, batch, layers), rtol=1e-4, atol=1e-6)
    wrong = Batch(**{**vars(batch), "weights": torch.where(batch.documents == 0, batch.weights, 0.0)})
    other = Batch(**{**vars(wrong), "ids": torch.where(batch.documents == 1, (batch.ids + 5) % 320, batch.ids)})
    first, second = (next(iter(both.losses(each)))[1] for each in (wrong, other))
    torch.testing.assert_close(first, second)  # what has no weight counts in no layer


@pytest.mark.parametrize("meta", [0, 3])
def test_gradients_of_recomputed_layers(tiny_teacher, meta):
    """The same with activation checkpointing, with meta tokens among the states too."""
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        teacher = teachers.load(str(tiny_teacher))
        student, _ = build(teacher, Layout.over(4, "AM", {"M": MIXER}, meta))
        options = Imitate.Options(
            tokens=1, lr=1.0, hidden=1.0, hidden_layers=[1, 3], train="all", activation_checkpointing=again
        )
        stage, batch = Imitate(teacher, student, options), text()
        stage.prepare()
        for _, loss in stage.losses(batch):
            loss.backward()
        gradients.append({name: parameter.grad for name, (_, parameter) in stage.trained().items()})
        stage.finish(lambda tokens: iter(()))
    assert gradients[0]["model.layers.0.mlp.up_proj.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_what_hidden_layers_are_refused(tiny_recipe):
    for layers, said in (
        ("[4]", "hidden_layers names layer 4, and the model has the layers 0 to 3"),
        ("[-1]", "hidden_layers.0 is -1: it should be a whole number from 0"),
        ("[1,1]", r"hidden_layers is \[1, 1\], which names a layer twice"),
        ("last", "hidden_layers is 'last'"),
    ):
        with pytest.raises(UserError, match=said):
            distill.plan(tiny_recipe, overrides=["stages.imitate.hidden=1", f"stages.imitate.hidden_layers={layers}"])
    with pytest.raises(UserError, match=r"hidden_layers is \[1\], but its weight, hidden, is 0; give hidden a weight"):
        load(tiny_recipe, "stages.imitate.hidden_layers=[1]")
