"""`replace`: further layers of a student become mixers, made from its own current attention; all else is unchanged."""

import pytest
import torch
from transformers import AutoConfig

import students
from distill.build import as_source, build, further_mixers, transfer_report
from distill.errors import UserError
from distill.evaluation.identity import before_replacing, check_replaced
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.kept_attention import depth_factor, frozen
from distill.stages.orient import Orient
from distill.stages.replace import MADE_FROM
from distill.training.optim import make_optimizer
from students.config import Layout
from students.converting import convert
from tests.distill.replacing import MIXERS, PLAIN, family_teacher, logits, replaced, trained
from tests.distill.stage_steps import batch, calibration, changed, snapshot

# the student


def test_plain_attention_in_further_layers_is_the_student_as_it_was_and_not_the_teacher(teacher):
    student, transfers = trained(teacher)
    text = batch()
    before, theirs = logits(student, text), logits(build(teacher, student.layout)[0], text)
    replaced(teacher, student, transfers, Layout.over(4, "APPM", MIXERS | PLAIN), text, scales=False)
    found = logits(student, text)
    assert torch.allclose(found, before, atol=1e-4) and not torch.allclose(found, theirs, atol=1e-2)
    assert student.newest == [1, 2] and student.layout.converted == [1, 2, 3]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3", "gemma2", "falcon"])
def test_other_families_too(family):
    """One weight for q, k and v, norms on q and k, soft caps, documents by positions."""
    teacher = family_teacher(family)
    student, transfers = trained(teacher, "AM")
    text = batch()
    text = type(text)(*[part % 90 if part is text.ids else part for part in vars(text).values()])
    before, layout = logits(student, text), Layout.over(2, "PM", MIXERS | PLAIN)
    seen = before_replacing(teacher, student, [0])
    stage = replaced(teacher, student, transfers, layout, text, scales=False)
    assert torch.allclose(logits(student, text), before, atol=1e-4 * before.abs().max())
    found = check_replaced(teacher, student, stage.taken, seen)
    assert found["logits"] < 1e-6 and set(found["layers"]) == {"0"}


@pytest.mark.parametrize("options", [{"mixer": "discrete_mamba2", "window": {"size": 4}}, {"mixer": "mamba2"}])
def test_new_mixers_are_made_of_the_students_own_attention_and_fitted_to_it(teacher, options):
    student, transfers = trained(teacher)
    text, layout = batch(), Layout.over(4, "ANAM", MIXERS | {"N": options})
    raw, _ = further_mixers(as_source(teacher, student), layout, student.shapes, [1])
    of_teacher, _ = further_mixers(teacher, layout, student.shapes, [1])
    source, wanted = as_source(teacher, student), {}
    for seen in source.observe(text.ids, text.positions, [1]):
        wanted = seen
    outside = snapshot(student)
    replaced(teacher, student, transfers, layout, text)
    own, theirs = dict(raw[1].named_parameters()), dict(of_teacher[1].named_parameters())
    copied = [name for name, made in transfers[1].sources.items() if "copied from attention" in made and name in own]
    assert copied and all(not torch.equal(own[name], theirs[name]) for name in copied)
    context = students.mixers.mixer.Context(documents=text.documents, rope=wanted.rope)
    with torch.no_grad():
        error = (student.mixers[1](wanted.input, context) - wanted.output).norm() / wanted.output.norm()
        first = (raw[1](wanted.input, context) - wanted.output).norm() / wanted.output.norm()
    assert error < 1 and error < first  # least squares: never worse than nothing
    left = {name for name in student.state_dict() if name in outside}
    assert all(torch.equal(student.state_dict()[name], outside[name]) for name in left)
    sources = transfer_report(teacher, student, transfers)["sources"]
    prefix = student.mixer_prefix(1)
    assert (
        "student's own attention" in sources[prefix + MADE_FROM] and "student's own" in sources[prefix + "(output scales)"]
    )
    assert prefix + "(output scales)" in sources and student.mixer_prefix(3) + MADE_FROM not in sources


def test_the_check_sees_what_else_changed(teacher):
    student, transfers = trained(teacher)
    seen = before_replacing(teacher, student, [1])
    stage = replaced(teacher, student, transfers, Layout.over(4, "AMAM", MIXERS), batch())
    slot = student.model.layers[1].self_attn
    assert check_replaced(teacher, student, stage.taken, seen)["logits"] == 0
    assert student.model.layers[1].self_attn is slot
    with torch.no_grad():
        student.model.norm.weight.data = student.model.norm.weight * 2
    with pytest.raises(UserError, match=r"layers \[1\] put back, the student is not what it was"):
        check_replaced(teacher, student, stage.taken, seen)


def test_a_converted_student_is_saved_and_loaded(teacher, tmp_path):
    student, transfers = trained(teacher)
    replaced(teacher, student, transfers, Layout.over(4, "AMAM", MIXERS), batch())
    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).distill["layout"]["pattern"] == "AMAM"
    loaded, text = students.load(tmp_path), batch()
    assert torch.allclose(logits(loaded, text), logits(student, text), atol=1e-6)
    generated = [one.generate(text.ids[:1, :5], max_new_tokens=4, do_sample=False) for one in (loaded, student)]
    assert torch.equal(*generated)


def test_mixers_for_other_layers_are_refused(teacher):
    student, _ = trained(teacher)
    mixers, _ = further_mixers(as_source(teacher, student), Layout.over(4, "AMAM", MIXERS), student.shapes, [1])
    with pytest.raises(ValueError, match=r"layers to convert are \[1, 2\], but there are mixers for \[1\]"):
        convert(student, Layout.over(4, "AMMM", MIXERS), mixers)
    assert student.layout.pattern == "AAAM"


# what follows


def test_layer_stages_take_the_new_layers_and_their_probe_takes_all(teacher):
    student, transfers = trained(teacher)
    text = batch()
    replaced(teacher, student, transfers, Layout.over(4, "AMAM", MIXERS), text)
    for kind in (Align, Orient):
        stage, every = (kind(teacher, student, kind.Options(tokens=1, lr=1e-3, layers=which)) for which in ("new", "all"))
        assert kind.Options(tokens=1, lr=1e-3).layers == "new"
        stage.begin(calibration(text)), every.begin(calibration(text))
        assert [name for name, _ in stage.losses(text)] == ["layer_01"]
        assert [name for name, _ in every.losses(text)] == ["layer_01", "layer_03"]
        assert all(name.startswith(student.mixer_prefix(1)) for name in stage.trained())
        assert 2 * sum(p.numel() for _, p in stage.trained().values()) == sum(p.numel() for _, p in every.trained().values())
        assert kind.count(student, stage.options) * 2 == kind.count(student, every.options)
        assert kind.probe_options().layers == "all"
        before = snapshot(student)
        stage.finish(calibration(text))
        assert all(name.startswith(student.mixer_prefix(1)) for name in changed(student, before))


@pytest.mark.parametrize("train", ["mixers", "mixers+norms", "all", "lora"])
def test_imitate_can_leave_the_old_mixers(teacher, train):
    student, transfers = trained(teacher)
    replaced(teacher, student, transfers, Layout.over(4, "AMAM", MIXERS), batch())
    options = Imitate.Options(tokens=1, lr=1e-3, layers="new", train=train)
    count = Imitate.count(student, options)
    stage = Imitate(teacher, student, options)
    stage.prepare()
    names = set(stage.trained())
    assert not any(name.startswith(student.mixer_prefix(3)) for name in names)
    assert any(name.startswith(student.mixer_prefix(1)) for name in names)
    assert count == sum(parameter.numel() for _, parameter in stage.trained().values())
    assert {role for role, _ in stage.trained().values()} <= Imitate.roles(student, options)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_frozen_queries_and_keys_stay(family):
    teacher = family_teacher(family)
    student, _ = trained(teacher, "AM")
    options = Imitate.Options(tokens=1, lr=1e-3, freeze=["q", "k"])
    stage = Imitate(teacher, student, options)
    stage.prepare()
    inside = [name for name in dict(student.named_parameters()) if name.startswith("model.layers.0.self_attn.")]
    still = {name.rpartition("self_attn.")[2] for name in inside if name not in stage.trained()}
    norms = {"q_norm.weight", "k_norm.weight"} if family == "qwen3" else set()
    assert still == {"q_proj.weight", "k_proj.weight"} | norms
    assert Imitate.count(student, options) == sum(p.numel() for _, p in stage.trained().values())
    assert frozen(student, ["q"]) < frozen(student, ["q", "k"]) and frozen(student, []) == set()
    assert not any(parameter.requires_grad for name, parameter in student.named_parameters() if name in frozen(student, "k"))


def test_freeze_is_refused_where_it_means_nothing():
    student, _ = trained(family_teacher("gpt_neox"), "AM")
    with pytest.raises(ValueError, match="keep queries, keys and values in one weight, query_key_value"):
        Imitate.check(student, Imitate.Options(tokens=1, lr=1e-3, freeze=["q"]), last=True)
    for train in ("mixers", "mixers+norms", "lora"):
        with pytest.raises(ValueError, match=f"freeze is .*train is '{train.replace('+', '[+]')}'"):
            Imitate.Options(tokens=1, lr=1e-3, freeze=["q"], train=train)


def test_rates_fall_with_depth(teacher):
    student, _ = trained(teacher)
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1e-2, layer_decay=0.5))
    stage.prepare()
    found = make_optimizer(stage.trained(), stage.options, factor=stage.rate_factor)
    rates = {id(parameter): group["peak"] for group in found.param_groups for parameter in group["params"]}
    named = {name: rates[id(parameter)] for name, (_, parameter) in stage.trained().items()}
    assert named["model.norm.weight"] == 1e-2 and named["model.embed_tokens.weight"] == 1e-2 / 16  # a head tied to it too
    for layer, wanted in enumerate([1 / 8, 1 / 4, 1 / 2, 1.0]):
        inside = {rate for name, rate in named.items() if name.startswith(f"model.layers.{layer}.")}
        assert inside == {1e-2 * wanted}, layer
    assert len(named) == len(rates) and depth_factor(student, "model.layers.0.x", 1.0) == 1.0
