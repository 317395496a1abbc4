"""The memory of stages, computed without values, against the memory that they take."""

import pytest
import torch
from transformers import AutoConfig

import distill
from distill.build import build
from distill.errors import UserError
from distill.footprint import COMPILED, Footprint, Shape, footprint, layers
from distill.footprint.ledger import Ledger
from distill.recipe_file import check
from distill.stages import STAGES, stage_class, stages_of
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.rates import rate_of
from students import kernels
from students.config import Layout
from teachers.families import family_of
from tests.distill.stage_steps import batch

MIXERS = {"M": {"mixer": "mamba2"}, "W": {"mixer": "attention", "window": 5, "sinks": 2}}
ROWS, TIME = 3, 24


def entry_of(name, **options):
    """A stage with its options, as a recipe has it, uncompiled."""
    recipe = {
        "name": "x", "teacher": "x", "pattern": "M", "mixers": {"M": {"mixer": "mamba2"}},
        "data": {"train": [{"path": "x"}], "heldout": [{"path": "x"}], "seq_len": TIME, "batch": 4},
        "stages": [{"initialise": {}}, {name: {"tokens": 64, "lr": 1e-3, "compile": False, **options}}],
    }  # fmt: skip
    return stages_of(check(recipe, "x"))[1]


def shape_of(folder, pattern, mixers=MIXERS, meta_tokens=0, **options):
    config = AutoConfig.from_pretrained(folder)
    used = {letter: mixers[letter] for letter in mixers if letter in pattern}
    layout = Layout.over(config.num_hidden_layers, pattern, used, meta_tokens)
    return Shape(config, family_of(config, "x"), layout, **{"autocast": False, "gpu": False} | options)


def really(teacher, shape, entry, backend):
    """The most bytes that live in forward and backward passes of a real student, beside weights, gradients and moments."""
    student, transfers = build(teacher, shape.layout)
    stage = entry.make(teacher, student, transfers)
    stage.prepare()
    text = batch(ROWS, TIME)
    for _, parameter in stage.trained().values():
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)
    chosen = kernels.on_paper() if backend == "triton" else kernels.backend("reference")
    with chosen, Ledger(gpu=backend == "triton") as ledger:
        for model in (teacher.model, student):
            for tensor in (
                *model.parameters(),
                *model.buffers(),
                *(p.grad for p in model.parameters() if p.grad is not None),
            ):
                ledger.count(tensor)
        there = ledger.live
        ledger.forget_peak()
        for _, loss in stage.losses(text):
            loss.backward()
        return ledger.peak - there


@pytest.mark.parametrize("name", ["orient", "align", "imitate"])
@pytest.mark.parametrize("pattern", ["AM", "MW"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_activations_are_those_of_a_real_step(teacher, tiny_teacher, name, pattern, backend):
    """On the references, and around Triton's kernels, whose launches take nothing and are left out of both."""
    shape, entry = shape_of(tiny_teacher, pattern, gpu=backend == "triton"), entry_of(name)
    found = footprint(shape, entry, TIME, ROWS).activations - 2**25 * (backend == "triton")
    measured = really(teacher, shape, entry, backend)
    assert found == pytest.approx(measured, rel=0.03, abs=20_000)


@pytest.mark.parametrize("options", [{"train": "mixers"}, {"train": "mixers+norms"}, {"train": "lora"}, {"hidden": 1.0}])
def test_what_trains_is_counted(teacher, tiny_teacher, options):
    shape, entry = shape_of(tiny_teacher, "AM"), entry_of("imitate", **options)
    student, _ = build(teacher, shape.layout)
    found = footprint(shape, entry, TIME, ROWS)
    trained = entry.kind.count(student, entry.options)
    assert found.trained == found.gradients == 4 * trained and found.moments == 8 * trained
    weights = {p.data_ptr(): p.numel() for p in teacher.model.parameters()}
    assert found.teacher == pytest.approx(4 * sum(weights.values()), rel=0.1)
    assert found.activations == pytest.approx(really(teacher, shape, entry, "reference"), rel=0.03, abs=20_000)


def test_recomputing_takes_less_and_more_windows_take_more(tiny_teacher):
    shape = shape_of(tiny_teacher, "AM", gpu=True, autocast=True, dtype=torch.bfloat16)
    taken = {
        kept: footprint(shape, entry_of("imitate", activation_checkpointing=kept), 256, 4).activations
        for kept in (False, "selective", True)
    }
    assert taken[True] < taken["selective"] < taken[False]
    wide = footprint(shape, entry_of("imitate"), 256, 8)
    assert 1.5 < (wide.activations - 2**25) / (taken[False] - 2**25) < 2.2
    assert (
        wide.trained == 2 * wide.moments / 4
        and wide.teacher < footprint(shape_of(tiny_teacher, "AM"), entry_of("align"), 64, 1).teacher
    )


def test_few_layers_stand_for_many(tiny_teacher, monkeypatch, name="imitate"):
    shape = shape_of(tiny_teacher, "AM")
    shape.config.num_hidden_layers = 13
    shape = Shape(shape.config, shape.family, Layout.over(13, "MMAM", {"M": MIXERS["M"]}), autocast=False, gpu=False)
    depths = []
    few = footprint(shape, entry_of(name), TIME, ROWS)
    with_few = layers.extrapolated
    monkeypatch.setattr("distill.footprint.extrapolated", lambda whole, measure: depths.append(1) or measure(whole))
    assert few.peak == pytest.approx(footprint(shape, entry_of(name), TIME, ROWS).peak, rel=0.02) and depths
    measured = []
    with_few(shape, lambda part: measured.append(part.config.num_hidden_layers) or {"x": 1.0})
    assert measured == [3, 4, 4]
    shared = Layout.over(13, "S", {"S": {"mixer": "shared_attention", "blocks": 2}})
    with_few(Shape(shape.config, shape.family, shared), lambda part: measured.append(part.config.num_hidden_layers) or {})
    assert measured[3:] == [13]  # layers that share a block are not counted one by one


def test_compiled_layers_keep_less(teacher):
    shape = Shape(teacher.config, teacher.family, Layout.over(4, "AM", {"M": {"mixer": "discrete_mamba2"}}))
    kept, fused = (footprint(shape, entry_of("imitate", compile=how), TIME, ROWS) for how in (False, None))
    assert fused.activations == pytest.approx(COMPILED * kept.activations) and fused.moments == kept.moments
    aligned = [footprint(shape, entry_of("align", compile=how), TIME, ROWS) for how in (False, None)]
    assert aligned[0] == aligned[1]


def test_shares_of_several_gpus():
    one = Footprint(teacher=100, student=60, trained=40, gradients=40, moments=80, activations=500)
    assert one.peak == 780
    assert one.sharded(4).peak == 100 + (20 + 10) + 10 + 20 + 500
    assert one.sharded(4, teacher_too=True).peak == 25 + (20 + 10) + 10 + 20 + 500


def test_rates_say_where_they_are_from():
    measured = rate_of(Align.rates, 1.236e9)
    assert measured.tokens == 88_105 and "measured on an H100: llama-3.2-1b" in measured.said
    between = rate_of(Align.rates, 3e9)
    assert 17_436 < between.tokens < 88_105 and "interpolated between 1.2B and 8B" in between.said
    assert rate_of(Align.rates, 16.06e9).tokens == pytest.approx(17_436 / 2)
    assert rate_of(Imitate.rates, 1e6).tokens == 69_709 and rate_of((), 1e9) is None
    for name in STAGES:
        points = stage_class(name).rates
        assert all(rate_of(points, point.parameters).tokens == point.tokens for point in points)


def test_plans_say_what_stages_need(tiny_recipe, capsys):
    from rich.console import Console

    from distill.plan_table import show

    tiny_recipe["data"]["batch"] = 8
    plan = distill.plan(tiny_recipe, gpus=1, gpu_memory=0.001)
    numbers = plan.numbers()["needs"]
    assert set(numbers) == {"orient", "align", "imitate"} and numbers["align"]["windows"] == 8
    assert numbers["align"]["bytes"]["peak"] > numbers["align"]["bytes"]["activations"] > 0
    show(plan, check(tiny_recipe, "tiny"), "tiny.yaml", Console(width=200))
    said = capsys.readouterr().out
    assert "align does not fit 0.001 GiB: lower stages.2.align.micro_batch (now 8)" in said
    assert "or set stages.3.imitate.activation_checkpointing=true" in said
    four = distill.plan(tiny_recipe | {"shard": "student"}, gpus=4).needs
    assert four["align"].windows == four["imitate"].windows == 2
    assert four["imitate"].footprint.moments < four["align"].footprint.moments
    with pytest.raises(UserError, match=r"data.batch is 8, and a batch of 8 windows cannot be shared by 3 processes"):
        distill.plan(tiny_recipe, gpus=3)
    for name, value in (("gpus", 0), ("gpu_memory", -1)):
        assert not distill.plan(tiny_recipe).needs
        with pytest.raises(UserError, match=f"{name} is {value}; it takes"):
            distill.plan(tiny_recipe, **{name: value})


def test_wide_operations_of_recomputed_layers(tiny_teacher):
    """Phi's activation has a power, which a GPU's autocast takes in float32, in the backward pass too."""
    from transformers import PhiConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = PhiConfig(vocab_size=320, max_position_embeddings=64, **sizes)
    shape = Shape(config, family_of(config, "x"), Layout.over(2, "M", {"M": {"mixer": "discrete_mamba2"}}))
    again, kept = (
        footprint(shape, entry_of("imitate", activation_checkpointing=how), TIME, ROWS).activations for how in (True, False)
    )
    assert 2**25 < again < kept
