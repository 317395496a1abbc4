"""Every stage lowers its own loss, changes only the weights that it trains, and solves its closed forms."""

from dataclasses import replace

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from distill.build import build, transfer_report
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.initialise import Initialise, half_lives, solve_scales
from distill.stages.orient import Orient
from distill.stages.probe import differs, probe, probed_stages
from distill.stages.scales import OutputScales
from distill.text.windows import Batch
from students.config import Layout
from students.mixers.mixer import Context
from tests.distill.stage_steps import batch, calibration, changed, snapshot
from tests.teachers.tiny import EVERY, tiny_teacher

LAYOUTS = {
    "discrete": {"mixer": "discrete_mamba2"},
    "stock": {"mixer": "mamba2"},
    "windowed": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2, "gate": True}},
    "stock windowed": {"mixer": "mamba2", "window": {"size": 4}},
}
every_mixer = pytest.mark.parametrize("mixer", LAYOUTS)


@pytest.fixture
def made(teacher, mixer):
    """A student of one mixer kind, initialised, with its transfer records and the batch it was calibrated on."""
    torch.manual_seed(2)
    student, transfers = build(teacher, Layout.over(4, "AM", {"M": LAYOUTS[mixer]}))
    text = batch()
    Initialise(teacher, student, Initialise.Options(tokens=1), transfers).begin(calibration(text))
    return student, transfers, text


def steps(stage, text, count, lr=3e-3):
    """Plain Adam on a stage's own losses; the mean loss of each step."""
    parameters = [parameter.requires_grad_(True) for _, parameter in stage.trained().values()]
    optimizer, means = torch.optim.Adam(parameters, lr), []
    for _ in range(count):
        losses = []
        for _, loss in stage.losses(text):
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        means.append(sum(losses) / len(losses))
    return means


@every_mixer
@pytest.mark.parametrize("kind", [Orient, Align], ids=["orient", "align"])
def test_layer_stages_lower_their_loss_and_touch_only_mixers(teacher, made, kind):
    student, _, text = made
    stage = kind(teacher, student, kind.Options(tokens=1, lr=1e-3))
    stage.begin(calibration(text))
    before = snapshot(student)
    means = steps(stage, text, 25)
    assert means[-1] < 0.97 * means[0]
    touched = changed(student, before)
    assert touched and all(".mixer." in name for name in touched)
    assert torch.equal(teacher.model.lm_head.weight, student.lm_head.weight)


@every_mixer
@pytest.mark.parametrize("train", ["mixers", "mixers+norms", "all", "lora"])
def test_imitate_trains_what_it_says(teacher, made, train):
    student, _, text = made
    teacher_before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1e-3, train=train))
    stage.prepare()
    stage.begin(calibration(text))
    before = {} if train == "lora" else snapshot(student)
    means = steps(stage, text, 20)
    assert means[-1] < means[0]
    stage.finish(calibration(text))
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in teacher.model.state_dict().items())
    if train == "lora":
        assert not [name for name, _ in student.named_parameters() if "lora" in name or "base_layer" in name]
        outside = {name for name in student.state_dict() if ".mixer." not in name}
        touched = {name for name in outside if not torch.equal(student.state_dict()[name], teacher_before[name])}
        assert touched == stage.changed(done=True) and any("mlp" in name for name in touched)
        return
    outside = {name for name in changed(student, before) if ".mixer." not in name}
    norms = {name for name in before if "norm" in name and ".mixer." not in name}
    wanted = {"mixers": set(), "mixers+norms": norms, "all": {name for name in before if ".mixer." not in name}}[train]
    assert outside == wanted


def test_lora_gives_gradients_to_adapters_and_mixers_only(teacher):
    student, _ = build(teacher, Layout.over(4, "AM", {"M": LAYOUTS["discrete"]}))
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1e-3, train="lora"))
    stage.prepare()
    for _, loss in stage.losses(batch()):
        loss.backward()
    with_gradients = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert with_gradients == set(stage.trained())
    assert any("lora_A" in name for name in with_gradients)


DROPOUT = ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "router_jitter_noise")


@pytest.mark.parametrize("name", EVERY)
def test_nothing_drops_out_where_layers_are_recomputed(name):
    """transformers recomputes in training mode; a copy of a teacher whose config has dropout still agrees with it."""
    teacher = tiny_teacher(name, **dict.fromkeys(DROPOUT, 0.5))
    student, _ = build(teacher, Layout("A" * teacher.n_layers))
    options = Imitate.Options(tokens=1, lr=1.0, train="all", activation_checkpointing=True)
    stage = Imitate(teacher, student, options)
    stage.prepare()
    text = batch()
    text = replace(text, ids=text.ids % 96, targets=text.targets % 96)
    ((_, loss),) = stage.losses(text)
    assert abs(loss.item()) < 1e-6
    recomputed = [module.training for module in student.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert recomputed and all(recomputed)
    stage.finish(calibration(text))
    assert not any(module.training for module in student.modules())


@every_mixer
def test_imitate_without_anything_to_learn_is_zero(teacher, mixer):
    """A student with nothing swapped agrees with its teacher: every divergence is zero."""
    student, _ = build(teacher, Layout("AAAA"))
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1.0, divergence=divergence, hidden=1.0))
        ((_, loss),) = stage.losses(batch())
        assert abs(loss.item()) < 1e-6


def test_a_sum_over_a_window_is_a_scale_and_a_share(teacher):
    """0.1 KL, `batchmean` over [batch, time, vocabulary], beside cross-entropy: The Mamba in the Llama's loss."""
    student, _ = build(teacher, Layout("AAMM", {"M": {"mixer": "mamba2"}}))
    ids = torch.randint(1, 320, (1, 41), generator=torch.Generator().manual_seed(7))
    time, zeros = 40, torch.zeros(1, 40, dtype=torch.long)
    text = Batch(ids[:, :-1], zeros, torch.arange(time)[None], ids[:, 1:], torch.ones(1, time), zeros)
    whole = 1 + 0.1 * time
    options = Imitate.Options(tokens=1, lr=1.0, ce=1 / whole, scale=whole, train="mixers")
    ((_, loss),) = Imitate(teacher, student, options).losses(text)
    own, other = (model(text.ids).logits.log_softmax(-1) for model in (student, teacher.model))
    kl = torch.nn.functional.kl_div(own, other.exp(), reduction="batchmean")
    wanted = 0.1 * kl + torch.nn.functional.cross_entropy(own[0], text.targets[0])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and kl > 0.1


@every_mixer
def test_losses_ignore_other_documents(teacher, made):
    """Changing the second document of a window leaves the first document's error alone."""
    student, _, text = made
    other = Batch(**{**vars(text), "ids": torch.where(text.documents == 1, (text.ids + 7) % 320, text.ids)})
    for seen, again in zip(
        *(teacher.observe(b.ids, b.positions, student.layout.converted) for b in (text, other)), strict=True
    ):
        mixer, half = student.mixers[seen.layer], text.ids.shape[1] // 2
        first, second = (mixer(one.input, Context(text.documents, one.rope)) for one in (seen, again))
        assert torch.allclose(first[:, :half], second[:, :half], atol=1e-5)
        assert not torch.allclose(first[:, half:], second[:, half:], atol=1e-3)


@every_mixer
def test_scales_are_the_least_squares_solution(teacher, made):
    """Solving again finds factors of 1, and moving any scale away makes the fit worse."""
    student, _, text = made
    for seen in teacher.observe(text.ids, text.positions, [1]):
        mixer, context = student.mixers[1], Context(text.documents, seen.rope)
        solver = OutputScales(mixer)
        solver.add(seen.input, context, seen.output)
        factors, residual = solver.solve()
        heard = solver.gram.diagonal() > 1e-12 * solver.gram.diagonal().max()
        assert torch.allclose(factors[heard], torch.ones_like(factors[heard]), atol=0.05)
        error = (mixer(seen.input, context) - seen.output).square().sum() / seen.output.square().sum()
        assert error.item() == pytest.approx(residual, abs=5e-3) and residual < 1
        for term in heard.nonzero().flatten().tolist():
            moved = torch.ones_like(factors)
            moved[term] = 1.3
            worse = solver.power - 2 * moved @ solver.moment + moved @ solver.gram @ moved
            assert worse.item() / solver.power > residual


@every_mixer
def test_scales_save_a_raw_copy(teacher, mixer):
    """Without them a raw q k mixer is far off; with them it starts below the power of what it should be."""
    torch.manual_seed(2)
    student, transfers = build(teacher, Layout.over(4, "AM", {"M": LAYOUTS[mixer]}))
    text = batch()
    initialise = Initialise(teacher, student, Initialise.Options(tokens=1, scales=False), transfers)
    initialise.begin(calibration(text))
    before = probe(teacher, student, text)["align"]
    solve_scales(teacher, student, [text])
    after = probe(teacher, student, text)["align"]
    assert after < 1.0 and after < before


def test_calibrated_half_lives_are_candidates(teacher):
    student, transfers = build(teacher, Layout.over(4, "AM", {"M": LAYOUTS["discrete"]}))
    Initialise(teacher, student, Initialise.Options(tokens=1, decay="calibrate"), transfers).begin(calibration(batch()))
    text = transfers[1].sources["(half-lives)"]
    chosen = [float(number) for number in text.removeprefix("calibrated: ").removesuffix(" tokens").split(", ")]
    assert len(chosen) == 4 and set(chosen) <= set(half_lives(student.mixers[1]).tolist()) == {2.0**k for k in range(2, 11)}


@every_mixer
def test_probe_depends_on_weights_alone(teacher, made):
    student, _, text = made
    first, again = (probe(teacher, student, text) for _ in range(2))
    assert first == again and set(probed_stages()) <= set(first)
    with torch.no_grad():
        next(iter(student.mixers.values())).requires_grad_(False)
        next(iter(next(iter(student.mixers.values())).parameters())).add_(0.1)
    assert differs(first, probe(teacher, student, text), 1e-4)


@every_mixer
def test_transfer_report_names_everything(teacher, made):
    student, transfers, _ = made
    report = transfer_report(teacher, student, transfers)
    assert {name for name, _ in student.named_parameters()} <= set(report["sources"])
    assert report["unused"] == []
    assert any("least squares" in text for text in report["sources"].values())


def test_orient_skips_what_has_no_such_matrix(teacher, caplog):
    caplog.set_level("INFO")
    student, _ = build(teacher, Layout.over(4, "MW", {"M": LAYOUTS["discrete"], "W": {"mixer": "attention", "window": 4}}))
    stage = Orient(teacher, student, Orient.Options(tokens=1, lr=1e-3))
    stage.begin(calibration(batch()))
    assert [name for name, _ in stage.losses(batch())] == ["layer_00", "layer_02"]
    assert "orient skips layers [1, 3]" in caplog.text


@pytest.mark.parametrize("mixer", ["discrete", "windowed"])
@pytest.mark.parametrize(("half_life", "size"), [(8.0, 1.0), (0.2, 1.0), (8.0, 1e-5), (0.2, 1e-3)])
def test_orient_scales_matrices_however_small(teacher, made, half_life, size):
    """Where a window ends, a state of short memory has decayed to a millionth: its scale is a minimum all the same."""
    student, _, text = made
    for made_mixer in student.mixers.values():
        ssm = getattr(made_mixer, "ssm", made_mixer)
        ssm.set_half_lives(torch.full((teacher.config.num_attention_heads,), half_life))
        with torch.no_grad():  # C's rows, and its bias
            states = ssm.n_heads * ssm.d_state
            for channels in (ssm.conv1d.weight, ssm.conv1d.bias):
                channels[-states:] *= size
    stage = Orient(teacher, student, Orient.Options(tokens=1, lr=1e-3))
    stage.begin(calibration(text))
    found, losses = stage.alpha.clone(), []
    for factor in (1.0, 0.5, 1.5):
        stage.alpha.copy_(factor * found)
        losses.append(torch.stack([loss.detach() for _, loss in stage.losses(text)]))
    assert (losses[0] < 1).all()
    assert (losses[0] < losses[1]).all() and (losses[0] < losses[2]).all()
