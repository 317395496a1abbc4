"""Faster steps on a GPU compute the same as what they replace: attention within documents, and compiled layers."""

import subprocess
import sys

import pytest
import torch
import yaml

from distill.packed_attention import Unserved, document_mask, packed_attention, serves
from tests.teachers.tiny import EVERY, tiny_teacher


@pytest.mark.parametrize("name", EVERY)
def test_packed_attention_is_every_familys_own(name):
    teacher = tiny_teacher(name)
    ids = torch.arange(60)[None] * 7 % teacher.config.vocab_size
    positions = torch.cat([torch.arange(13), torch.arange(1), torch.arange(46)])[None]
    wanted = teacher.hidden(ids, positions)
    assert serves(teacher) == teacher.family.recorded
    if not teacher.family.recorded:
        return
    before = teacher.config._attn_implementation
    with packed_attention(teacher.config):
        torch.testing.assert_close(teacher.hidden(ids, positions), wanted, rtol=1e-4, atol=1e-4)
        seen = next(iter(teacher.observe(ids, positions, [1], qkv=True)))
        with packed_attention(teacher.config):  # once more changes nothing
            torch.testing.assert_close(teacher.hidden(ids, positions), wanted, rtol=1e-4, atol=1e-4)
    plain = next(iter(teacher.observe(ids, positions, [1], qkv=True)))
    for part in ("output", "q", "k", "v"):
        torch.testing.assert_close(getattr(seen, part), getattr(plain, part), rtol=1e-4, atol=1e-4)
    assert teacher.config._attn_implementation == before
    leaking = teacher.hidden(ids, torch.arange(60)[None])
    assert (leaking - wanted).norm() > 1e-3 * wanted.norm()


def test_an_attention_that_computes_otherwise_is_not_served(monkeypatch):
    teacher = tiny_teacher("smollm2-135m-instruct")
    monkeypatch.setattr("distill.packed_attention.attention", lambda q, k, v, **rest: torch.zeros_like(q))
    assert not serves(teacher)


def test_a_mask_of_padding_is_refused():
    with pytest.raises(Unserved, match="padding"):
        document_mask(1, 4, 4, lambda *places: True, attention_mask=torch.ones(1, 4))


COMPILED = """
import sys, torch
from distill.benchmarks.steps import RandomText
from distill.build import build
from distill.recipe_file import load
from distill.runs.session import make_accelerator
from distill.stages import stages_of
from distill.training.trainer import Trainer
from students.config import Layout
from tests.teachers.tiny import tiny_teacher

compile_, made = torch.compile, []

def traced(forward, **options):  # and not lowered: what is traced is what could go wrong
    made.append(forward)
    return compile_(forward, backend="aot_eager", **options)

torch.compile = traced

def losses(recipe, teacher, compiled):
    found = []
    for entry in stages_of(recipe)[2:]:
        torch.manual_seed(0)
        student, transfers = build(teacher, Layout.over(teacher.n_layers, recipe.pattern, recipe.mixers))
        stage = entry.kind(teacher, student, entry.options.model_copy(update={"compile": compiled}), transfers)
        stage.prepare()
        text = RandomText(24, teacher.config.vocab_size)
        stage.begin(lambda tokens: iter([text.batch(0, 2)]))
        trainer = Trainer(stage, make_accelerator(recipe, None), text, 0, 3, 2)
        reports = [trainer.step(step) for step in range(2)]
        assert not any("forward" in vars(module) for module in [*teacher.model.modules(), *student.modules()])
        found += [(report.loss, report.gradient_norm) for report in reports]
    return torch.tensor(found)

teacher = tiny_teacher("smollm2-135m-instruct")
recipe = load(sys.argv[1], ["stages.imitate.activation_checkpointing=true"])
plain = losses(recipe, teacher, None)
assert not made
torch.testing.assert_close(losses(recipe, teacher, True), plain, rtol=1e-5, atol=1e-6)
assert len(made) > 3 * teacher.n_layers, made
from torch._dynamo.utils import counters
assert counters["frames"]["ok"] > 5, counters["frames"]
"""


def test_compiled_layers_train_as_they_are(tiny_recipe, tmp_path):
    """In a process of its own: the checks of shapes, which tests turn on, cannot be traced."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "tiny.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not done.returncode, done.stderr[-3000:]
