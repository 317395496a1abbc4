"""`replace`: further layers of a student become mixers, made from its own current attention; all else is unchanged."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig

import students
from distill import run
from distill.build import as_source, build, further_mixers, transfer_report
from distill.errors import Interrupted, UserError
from distill.evaluation import samples
from distill.evaluation.identity import before_replacing, check_replaced
from distill.planning import make_plan
from distill.recipe import Selected
from distill.recipe_file import check, load
from distill.runs import checkpoint
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection.checking import marked
from distill.selection.present import choose_layers
from distill.stages import stages_of
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.kept_attention import depth_factor, frozen
from distill.stages.layouts import Further, first_layout, layouts_of
from distill.stages.orient import Orient
from distill.stages.replace import MADE_FROM, Replace
from distill.training.optim import make_optimizer
from students.config import Layout
from students.converting import convert, further
from tests.conftest import tiny_entries
from tests.distill.test_stages import batch, calibration, changed, snapshot
from tests.teachers.tiny import CHECKPOINTS
from tests.teachers.tiny import tiny_teacher as published

MIXERS = {"M": {"mixer": "discrete_mamba2"}}
PLAIN = {"P": {"mixer": "attention"}}


def family_teacher(family):
    return published(CHECKPOINTS[family][0])


def trained(teacher, pattern="AAAM", mixers=MIXERS):
    """A student whose kept attention is no longer the teacher's."""
    student, transfers = build(teacher, Layout.over(teacher.n_layers, pattern, mixers))
    with torch.no_grad():
        for layer in range(teacher.n_layers):
            if student.layout.mixer_of(layer) is None:
                slot = getattr(student.get_submodule(student.place.layers)[layer], student.place.name)
                for parameter in slot.parameters():  # a memory of its own: the teacher's stays
                    parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    return student, transfers


def replaced(teacher, student, transfers, layout, text, **options):
    stage = Replace(teacher, student, Replace.Options(tokens=1, layers=[0], **options), transfers)
    stage.become(layout)
    stage.begin(calibration(text))
    return stage


def logits(student, text):
    with torch.no_grad():
        return student(input_ids=text.ids, document_ids=text.documents).logits


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


REFUSED = [
    (("AM", MIXERS), ("AM", MIXERS), "all layers of the layout are converted already"),
    (("AM", MIXERS), ("MA", MIXERS), "layer 1 is converted already"),
    (("AM", MIXERS), ("MN", {"M": MIXERS["M"], "N": {"mixer": "mamba2"}}), "layer 1 is converted already, to M"),
    (("AM", MIXERS), ("SM", MIXERS | {"S": {"mixer": "shared_attention"}}), "shared_attention .S. cannot be added later"),
]


@pytest.mark.parametrize(("before", "after", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_layouts_that_cannot_follow(before, after, said):
    with pytest.raises(ValueError, match=said):
        further(Layout.over(2, *before), Layout.over(2, *after))


def test_what_shares_or_learned_from_the_beginning_cannot_come_later():
    window = {"mixer": "attention", "window": 4}
    taker = {"S": {"mixer": "attention", "window": 4, "share_kv": True}, "W": window}
    with pytest.raises(ValueError, match=r"attention .S. cannot be added later with share_kv"):
        further(Layout.over(3, "WAA", {"W": window}), Layout.over(3, "WSA", taker))
    with pytest.raises(ValueError, match=r"layer 2 shares .* of layer 0, and would share those of layer 1"):
        further(Layout.over(3, "WAS", taker), Layout.over(3, "WWS", taker))
    with pytest.raises(ValueError, match="the student has 2 meta tokens"):
        further(Layout.over(2, "AM", MIXERS, 2), Layout.over(2, "M", MIXERS, 2))
    with pytest.raises(ValueError, match="meta_tokens would change from 0 to 2"):
        further(Layout.over(2, "AM", MIXERS), Layout.over(2, "M", MIXERS, 2))


def test_mixers_for_other_layers_are_refused(teacher):
    student, _ = trained(teacher)
    mixers, _ = further_mixers(as_source(teacher, student), Layout.over(4, "AMAM", MIXERS), student.shapes, [1])
    with pytest.raises(ValueError, match=r"layers to convert are \[1, 2\], but there are mixers for \[1\]"):
        convert(student, Layout.over(4, "AMMM", MIXERS), mixers)
    assert student.layout.pattern == "AAAM"


# which layers

EVEN = [  # before, keep, after
    ("MA" * 4, 2, "MAMMMAMM"),
    ("A" * 8, 0.5, "AMAMAMAM"),
    ("MA" * 4, 0, "M" * 8),
]


@pytest.mark.parametrize(("before", "keep", "after"), EVEN)
def test_even_layers_are_chosen_among_those_with_attention(before, keep, after):
    options = Further(pattern={"keep": keep, "by": "even"})
    layout = Layout.over(len(before), before, MIXERS if "M" in before else {})
    assert options.after(layout, MIXERS).pattern == after


def test_half_then_a_quarter_of_thirty():
    found = Further(pattern={"keep": 0.25, "by": "even"}).after(Layout.over(30, "AM", MIXERS), MIXERS)
    assert [layer for layer in range(30) if layer not in found.converted] == [0, 2, 6, 10, 14, 18, 22, 26]


def test_half_of_the_attention_goes_where_nothing_is_said():
    layout, found = Layout.over(16, "AM", MIXERS), []
    while len(layout.converted) < 16:
        layout = Further().after(layout, MIXERS)
        found.append([layer for layer in range(16) if layer not in layout.converted])
    assert found == [[0, 4, 8, 12], [0, 8], [0], []]


def test_layers_and_patterns():
    before, two = Layout.over(4, "AAAM", MIXERS), MIXERS | {"N": {"mixer": "mamba2"}}
    assert Further(layers=[2, 0]).after(before, MIXERS).pattern == "MAMM"
    assert Further(layers=[1], mixer="N").after(before, two).pattern == "ANAM"
    found = Further(pattern="ANMM").after(before, two)
    assert found.pattern == "ANMM" and found.mixers == two


STAGE = [
    ({"layers": [3]}, "layers names layer 3, which is converted already (M)"),
    ({"layers": [9]}, "layers names layer 9, and the model has the layers 0 to 3"),
    ({"layers": [1, 1]}, "names a layer twice"),
    ({"layers": []}, "at least 1 item"),
    ({"layers": [1], "pattern": "M"}, "layers and pattern both say"),
    ({"layers": [1], "mixer": "N"}, "mixer is 'N', but the recipe's mixers are M; name one"),
    ({"pattern": "AM", "mixer": "M"}, "the letters of pattern already name the mixers"),
    ({"pattern": "am"}, "capital letters"),
    ({"pattern": "AAAA"}, "layer 1 is converted already (M), and its attention cannot be restored"),
    ({"pattern": "XM"}, "uses 'X', but no mixer is given for it"),
    ({"pattern": "MMMMMM"}, "names 6 layers, but the model has 4"),
    ({"pattern": "AM"}, "all layers of the layout are converted already"),
    ({"pattern": {"by": "even"}}, "`keep`, the number of layers that keep attention, is missing"),
    ({"pattern": {"keep": 1}}, "by: even spreads them"),
    ({"pattern": {"keep": 1.5, "by": "even"}}, "keep is 1.5"),
    ({"pattern": {"keep": True, "by": "even"}}, "keep is True"),
    ({"pattern": {"keep": 1, "by": "even", "window": 4}}, "by: even has no option but keep; leave 'window' out"),
    ({"pattern": {"keep": 2, "by": "even"}}, "2 of 4 layers, and 2 have attention: none would be converted"),
    ({"pattern": {"keep": 1, "by": "evn"}}, "there is no scorer 'evn'; did you mean 'even'"),
    ({"pattern": {"keep": 1, "by": "kl", "toknes": 3}}, "toknes is not a key here; did you mean 'tokens'"),
    ({"pattern": {"keep": 1, "by": "kl", "rest": "M"}}, "replace.mixer names the letter"),
    (
        {"pattern": {"keep": 1, "by": "retrieval-heads"}},
        "cannot choose layers of a student that has mixers: it chooses single",
    ),
    (
        {"pattern": {"keep": 1, "by": "kl", "protect": [1]}},
        "protect names layer 1, and the layers with attention are [0, 2]",
    ),
    ({"pattern": {"keep": 2, "by": "kl"}}, "none would be converted; keep fewer"),
    ({"pattern": {"keep": 1, "by": "recall", "length": 4096}}, "stages.replace.pattern.length is 4096"),
    ({"layers": [0], "tokens": "many"}, "tokens is 'many'"),
    ({"layers": [0], "mixr": "M"}, "mixr is not a key here; did you mean 'mixer'"),
]


@pytest.mark.parametrize(("options", "said"), STAGE, ids=[row[1] for row in STAGE])
def test_stages_that_cannot_be(tiny_recipe, options, said):
    tiny_recipe["stages"].insert(1, {"replace": options})
    with pytest.raises(UserError) as found:
        make_plan(check(tiny_recipe, "tiny.yaml"))
    assert said in str(found.value) and "stages.replace" in str(found.value)


def test_none_is_left(tiny_recipe):
    tiny_recipe["stages"] += [{"replace": {"pattern": "M"}}, {"replace": {"layers": [0]}}]
    with pytest.raises(UserError, match=r"stages.5: every layer is converted already; no attention layer is left"):
        make_plan(check(tiny_recipe, "tiny.yaml"))


def test_rates_and_frozen_parts_are_checked_under_the_layout_of_their_stage(tiny_recipe):
    tiny_recipe["stages"] = [
        {"initialise": {"tokens": 64}},
        {"imitate": {"tokens": 64, "lr": 1e-3, "freeze": ["q"]}},
        {"replace": {"pattern": "M"}},
        {"imitate": {"tokens": 64, "lr": 1e-3, "freeze": ["q", "k"]}},
    ]
    with pytest.raises(UserError, match=r"no layer of the student keeps attention; leave freeze out"):
        make_plan(check(tiny_recipe, "tiny.yaml"))


def test_a_plan_says_what_each_step_converts_and_trains(tiny_recipe):
    tiny_recipe["mixers"]["N"] = {"mixer": "mamba2"}
    tiny_recipe["stages"] += [
        {"replace": {"layers": [0], "mixer": "N"}},
        {"align": {"tokens": 256, "lr": 1e-3}},
        {"imitate": {"tokens": 256, "lr": 1e-3, "train": "mixers"}},
    ]
    recipe = check(tiny_recipe, "tiny.yaml")
    plan = make_plan(recipe)
    assert plan.layout.pattern == "AMAM" and plan.layout.mixers.keys() == {"M"}
    assert {name: layout.pattern for name, layout in plan.replaced.items()} == {"replace": "NMAM"}
    assert plan.last.mixers.keys() == {"M", "N"} and plan.trained["replace"] == 0
    old, new, both = plan.trained["imitate"], plan.trained["align (5)"], plan.trained["imitate (6)"]
    assert new > 0 and both == old + new
    layouts = layouts_of(recipe, first_layout(recipe, 4, "x"), "x")
    assert [layout.pattern for layout in layouts] == ["AMAM"] * 4 + ["NMAM"] * 3


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


# a run


def steps_of_a_run(tiny_teacher, text_files):
    """Half of the layers, a quarter by a scorer, and none: every kind of stage in between, a checkpoint a step."""
    entries = tiny_entries(tiny_teacher, text_files) | {"checkpoints": {"steps": 1}}
    entries["evaluation"] = {"tokens": 64, "probe_tokens": 32, "passkey": [64], "passkey_trials": 1}
    entries["stages"] = [
        {"initialise": {"tokens": 128}},
        {"imitate": {"tokens": 256, "lr": 1e-2, "train": "all"}},
        {"replace": {"pattern": {"keep": 1, "by": "kl", "tokens": 64}, "tokens": 128}},
        {"align": {"tokens": 256, "lr": 1e-2}},
        {"replace": {"pattern": "M", "tokens": 128}},
        {"imitate": {"tokens": 256, "lr": 1e-2, "train": "mixers+norms"}},
    ]
    return entries


@pytest.fixture
def entries(tiny_teacher, text_files, monkeypatch):
    """The same without twin and export."""
    monkeypatch.setattr(samples, "NEW_TOKENS", 2)
    return steps_of_a_run(tiny_teacher, text_files)


def outcome(folder):
    lines = [(line["stage_index"], line["step"], line["loss"]) for line in folder.metrics()]
    return load_file(folder.student / "model.safetensors"), lines, folder.read("transfer.json")


def assert_same(one, other):
    assert one[1:] == other[1:] and one[0].keys() == other[0].keys()
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_teacher, text_files):
    """An undisturbed run, with twin and export."""
    entries = steps_of_a_run(tiny_teacher, text_files) | {"twin": True, "export": ["portable"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "NEW_TOKENS", 2)
        return run(check(entries, "tiny.yaml"), runs=tmp_path_factory.mktemp("whole"))


def test_a_run_says_what_it_converted_everywhere(whole):
    after = whole.read("evaluations.json")["after"]
    first, last = after["2-replace"], after["4-replace"]
    assert len(first["converted"]) == 1 and first["pattern"].count("A") == 1 and last["pattern"] == "MMMM"
    assert sorted(first["converted"] + last["converted"]) == [0, 2]
    for found in (first, last):
        assert found["identity"]["logits"] < 1e-6 and max(found["identity"]["layers"].values()) < 1e-4
        assert set(found["identity"]["layers"]) == {str(layer) for layer in found["converted"]}
    assert {f"align/layer_0{layer}" for layer in range(4)} <= after["5-imitate"]["probe"].keys()
    assert json.loads((whole.student / "config.json").read_text())["distill"]["layout"]["pattern"] == "MMMM"
    assert (
        json.loads((whole.path / "export" / "portable" / "config.json").read_text())["distill"]["layout"]["pattern"]
        == "MMMM"
    )
    assert whole.read("evaluations.json")["final"]["pattern"] == "MMMM"
    assert "Stage 2-replace converted layers" in (whole.path / "report.html").read_text()
    chosen = whole.read("selection-2-replace.json")
    assert chosen["chosen"]["pattern"] == first["pattern"] and len(chosen["measured"]) > 2
    sources = whole.read("transfer.json")["sources"]
    assert {layer for layer in range(4) if f"model.layers.{layer}.self_attn.mixer.{MADE_FROM}" in sources} == {0, 2}


def test_a_twin_converts_the_same_layers(whole):
    after, twin = whole.read("evaluations.json")["after"], yaml.safe_load((whole.path / "twin" / "recipe.yaml").read_text())
    patterns = [stage["replace"]["pattern"] for stage in twin["stages"] if "replace" in stage]
    assert patterns == [after[key]["pattern"] for key in ("2-replace", "4-replace")]
    assert twin["mixers"]["M"]["mixer"] == "attention"
    saved = json.loads((whole.path / "twin" / "student" / "config.json").read_text())["distill"]["layout"]
    assert saved["pattern"] == "MMMM" and saved["mixers"]["M"]["mixer"] == "attention"


def test_a_run_that_is_stopped_everywhere_ends_in_the_same_bits(entries, whole, tmp_path, monkeypatch):
    """Also between the measurements of the layers to convert, each of which is kept."""
    recipe, stops = check(entries, "tiny.yaml"), []
    while True:
        steps = iter(range(10_000))
        monkeypatch.setattr(Stopper, "due", lambda self, steps=steps: "enough" if next(steps) == 2 else None)
        try:
            parts = run(recipe, runs=tmp_path)
            break
        except Interrupted as reason:
            stops.append(str(reason))
    assert len(stops) >= 3 and any("while selecting" in stop and "selection-2-replace.json" in stop for stop in stops)
    assert_same(outcome(whole), outcome(parts))


def test_a_run_that_ends_while_layers_are_converted(entries, whole, tmp_path, monkeypatch):
    """Everything of the stage is written but its checkpoint, or nothing is: it converts them again, to the same bits."""
    recipe, begin, reinstated = check(entries, "tiny.yaml"), checkpoint.begin, []

    def fail(folder, state):
        if state.stage in (2, 4) and state.stage not in reinstated:
            reinstated.append(state.stage)
            raise OSError("power lost")
        return begin(folder, state)

    monkeypatch.setattr(checkpoint, "begin", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="power lost"):
            run(recipe, runs=tmp_path)
    assert_same(outcome(whole), outcome(run(recipe, runs=tmp_path)))


def test_a_checkpoint_of_another_layout_is_refused(entries, tmp_path, monkeypatch):
    recipe = check(entries, "tiny.yaml")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: None if not list(tmp_path.glob("*/checkpoints/2-*")) else "enough")
        run(recipe, runs=tmp_path)
    (state,) = tmp_path.glob("*/checkpoints/3-*/state.json")
    saved = checkpoint.read_state(state.parent)
    for layouts in ({}, {"2": "AMAM"}, {"2": "MMXM"}):
        saved.layouts = layouts
        saved.digest = saved.hashed()
        state.write_text(json.dumps(vars(saved)))
        with pytest.raises(UserError, match="no stage of this recipe makes the layout"):
            run(recipe, runs=tmp_path)


def test_two_processes_convert_the_same_layers(entries, whole, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(entries))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    script = ["-m", "distill.cli", "run", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "two").glob("tiny-*")
    found, expected = (json.loads((folder / "evaluations.json").read_text()) for folder in (path, whole.path))
    for key in ("2-replace", "4-replace"):
        assert found["after"][key]["pattern"] == expected["after"][key]["pattern"]
    kls = [one["final"]["rows"]["student"]["fidelity"]["kl"] for one in (found, expected)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-2)


def test_a_run_from_a_student_converts_more_of_it(entries, tiny_recipe, tmp_path):
    """Its own attention, as its run trained it; the layout is its config's."""
    entries["stages"] = entries["stages"][:2]
    first = run(check(entries, "tiny.yaml"), runs=tmp_path)
    entries = {name: value for name, value in tiny_recipe.items() if name not in ("pattern", "mixers")}
    entries |= {"student": str(first.path), "stages": [{"replace": {"layers": [2], "tokens": 64}}]}
    second = run(load(entries), runs=tmp_path)
    assert json.loads((second.student / "config.json").read_text())["distill"]["layout"]["pattern"] == "AMMM"
    before, after = (load_file(one.student / "model.safetensors") for one in (first, second))
    kept = {name for name in before if "layers.2.self_attn" not in name}
    assert kept < after.keys() and all(torch.equal(before[name], after[name]) for name in kept)


# scorers on the present student


@pytest.mark.parametrize("options", [{"by": "greedy", "measure": "kl", "beam": 1}, {"by": "gates", "training_tokens": 64}])
@pytest.mark.parametrize("stand_in", ["window", "mixer"])
def test_scorers_leave_the_student_as_it_was(entries, tmp_path, options, stand_in):
    pattern = {"keep": 1, "tokens": 64, "length": 64, "trials": 1, "families": ["passkey"], "stand_in": stand_in} | options
    entries["stages"][2] = {"replace": {"pattern": pattern, "tokens": 64}}
    recipe = check(entries, "tiny.yaml")
    session = Session.open(recipe)
    student, _ = trained(session.teacher, "AMAA", recipe.mixers)
    before, text = snapshot(student), batch()
    wanted, modules = logits(student, text), [type(part) for part in student.modules()]
    folder = RunDir.open(recipe, tmp_path, False)
    entry = stages_of(recipe)[2]
    read = ["passkey"] if options["by"] == "gates" else []
    assert marked(recipe).selected == Selected(by=options["by"], families=read)
    stay = choose_layers(session, folder, entry, student, session.calibration(0), Console(quiet=True), Stopper())
    assert len(stay) == 1 and stay[0] in (0, 2, 3)
    assert not changed(student, before) and torch.equal(logits(student, text), wanted)
    assert [type(part) for part in student.modules()] == modules and student.layout.pattern == "AMAA"
    ranking = folder.read(f"selection-{entry.key}.json")["chosen"]["ranking"]
    assert {int(one["name"]) for one in ranking} <= {0, 2, 3}


@pytest.mark.parametrize("counts", [1, 3])
def test_the_layer_that_counts_stays(entries, tmp_path, counts):
    """Of attentions that add nothing but one, that one stays; what is converted already stands aside."""
    pattern = {"keep": 1, "by": "kl", "tokens": 64, "window": 2, "sinks": 0}
    entries["mixers"] = {"M": {"mixer": "attention"}}
    entries["stages"][2] = {"replace": {"pattern": pattern, "tokens": 64}}
    recipe = check(entries, "tiny.yaml")
    session = Session.open(recipe)
    student, _ = build(session.teacher, Layout.over(4, "MAAA", recipe.mixers))
    with torch.no_grad():
        for layer in {1, 2, 3} - {counts}:  # the teacher's too: it is the same memory
            student.model.layers[layer].self_attn.o_proj.weight.zero_()
    entry, folder = stages_of(recipe)[2], RunDir.open(recipe, tmp_path, False)
    stay = choose_layers(session, folder, entry, student, session.calibration(0), Console(quiet=True), Stopper())
    ranking = folder.read(f"selection-{entry.key}.json")["chosen"]["ranking"]
    assert stay == [counts] and ranking[0]["score"] > 1e-3 and all(abs(one["score"]) < 1e-6 for one in ranking[1:])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_teacher_in_bfloat16(entries, tmp_path, precision):
    """Masters that a stage trained beside weights of the teacher's type: what the mixers are made from is float32."""
    entries["stages"] = [entries["stages"][1], {"replace": {"layers": [2], "tokens": 64}}, entries["stages"][3]]
    entries["stages"].insert(0, {"initialise": {"tokens": 64}})
    entries |= {"precision": precision, "teacher_dtype": "bfloat16"}
    folder = run(check(entries, "tiny.yaml"), runs=tmp_path)
    found = folder.read("evaluations.json")["after"]["2-replace"]["identity"]
    assert found["logits"] < 1e-2 and found["layers"]["2"] < 1e-1
    tensors = load_file(folder.student / "model.safetensors")
    prefix = "model.layers.2.self_attn."
    assert {name.startswith(prefix + "mixer.") for name in tensors if name.startswith(prefix)} == {True}
