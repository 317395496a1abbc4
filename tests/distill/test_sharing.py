"""Attention shared by layers: made from all of them, owned by the first, trained by all, saved once."""

import pytest
import torch
from safetensors.torch import load_file

import students
from distill import run
from distill.build import build, count_parameters, transfer_report
from distill.errors import Interrupted, UserError
from distill.recipe_file import check
from distill.runs import checkpoint
from distill.runs.stopper import Stopper
from distill.stages.align import Align
from distill.text.windows import Batch
from distill.training.optim import make_optimizer
from students.config import Layout

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDTHS = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}


def shared(teacher, pattern="S", **options):
    return build(teacher, Layout.over(4, pattern, {"S": {"mixer": "shared_attention", **options}}))


def batch(rows=2, time=16):
    ids = torch.randint(1, 320, (rows, time + 1))
    positions = torch.arange(time).expand(rows, -1)
    return Batch(ids[:, :-1], torch.zeros_like(positions), positions, ids[:, 1:], torch.ones(rows, time), positions * 0)


def test_blocks_take_turns(teacher):
    student, _ = shared(teacher, blocks=2, rank=2)
    bases = [mixer.q_proj.base for mixer in student.mixers.values()]
    assert bases[0] is bases[2] and bases[1] is bases[3] and bases[0] is not bases[1]
    one, _ = shared(teacher, "SSAS", rank=2)
    assert len({id(mixer.o_proj.base) for mixer in one.mixers.values()}) == 1
    with pytest.raises(UserError, match=r"blocks \(S\) is 3, but S has 2 layers"):
        shared(teacher, "SA", blocks=3)


def test_parameters_are_counted_once(teacher):
    student, _ = shared(teacher, rank=2)
    block = sum(rows * columns for rows, columns in WIDTHS.values())
    site = sum(2 * (rows + columns) for rows, columns in WIDTHS.values()) + 4
    assert count_parameters(student) == count_parameters(teacher.model) - 4 * block + block + 4 * site
    assert Align.count(student, Align.Options(tokens=1, lr=1.0)) == block + 4 * site


def test_with_whole_deltas_it_is_the_teacher(teacher):
    ids = torch.randint(1, 320, (2, 20))
    for start in ("mean", "central"):
        student, _ = shared(teacher, rank=32, start=start)
        assert torch.allclose(student(ids).logits, teacher.model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["mean", "central"])
def test_deltas_are_the_best_of_their_rank(teacher, start):
    """The residual of the record is the truncated SVD's, and falls with the rank."""
    wanted = [teacher.slot(layer).q_proj.weight for layer in range(4)]
    base = torch.stack(wanted).mean(0) if start == "mean" else None
    shares = {}
    for rank in (0, 1, 8, 31):
        student, transfers = shared(teacher, rank=rank, start=start)
        base = student.mixers[0].q_proj.base if base is None else base
        assert torch.allclose(student.mixers[0].q_proj.base, base)
        singular = torch.linalg.svdvals(wanted[1] - base)
        left = (wanted[1] - student.mixers[1].q_proj.weight).norm()
        assert torch.allclose(left, singular[rank:].norm(), atol=1e-4)
        shares[rank] = (left / wanted[1].norm()).square().item()
        said = transfers[1].sources["q_proj.up" if rank else "(q left out)"]
        assert f"{shares[rank]:.1%} of the power of" in said
    assert shares[0] > shares[1] > shares[8] > shares[31]


def test_central_is_the_layer_nearest_to_all(teacher):
    """Three layers made nearly alike, one of them between the other two, and a stranger."""
    with torch.no_grad():
        for name in PROJECTIONS:
            base, step = (torch.randn(WIDTHS[name]) for _ in range(2))
            for layer, far in enumerate((-0.1, 0.1, 0.0)):
                getattr(teacher.slot(layer), name).weight.copy_(base + far * step)
    student, transfers = shared(teacher, start="central")
    assert torch.equal(student.mixers[3].v_proj.base, teacher.slot(2).v_proj.weight)
    assert transfers[0].sources["v_proj.shared.weight"] == "number 3 of attention v in 4 layers"


def test_the_report_covers_every_site(teacher):
    student, transfers = shared(teacher, "SA", rank=2)
    report = transfer_report(teacher, student, transfers)
    assert set(report["sources"]) == {name for name, _ in student.named_parameters()} and report["unused"] == []


def test_a_student_is_saved_once_and_comes_back_tied(teacher, tmp_path):
    student, _ = shared(teacher, blocks=2, rank=2)
    ids = torch.randint(1, 320, (2, 9))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    said, logits = student.generate(ids, **options), student(ids).logits
    student.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("q_proj.shared.weight")]
    assert names == [f"model.layers.{layer}.self_attn.mixer.q_proj.shared.weight" for layer in (0, 1)]
    again = students.load(tmp_path)
    mixers = again.mixers
    assert all(getattr(mixers[0], name).base is getattr(mixers[2], name).base for name in PROJECTIONS)
    assert count_parameters(again) == count_parameters(student)
    assert torch.equal(again(ids).logits, logits) and torch.equal(again.generate(ids, **options), said)
    with torch.no_grad():
        mixers[1].k_proj.base.zero_()
    assert not mixers[3].k_proj.base.any()
    half = again.to(torch.bfloat16)
    assert half.mixers[0].q_proj.base is half.mixers[2].q_proj.base and half.mixers[2].q_proj.base.dtype == torch.bfloat16


def test_each_site_has_its_own_keys(teacher):
    student, _ = shared(teacher, rank=2)
    cache = student.new_cache()
    student(torch.randint(1, 320, (1, 6)), past_key_values=cache)
    keys = [layer.read("k") for layer in cache.layers]
    assert all(key.shape == (1, 6, 2, 8) for key in keys) and not torch.equal(keys[0], keys[1])


def test_layers_add_up_their_gradients_and_the_optimizer_takes_one_step(teacher):
    student, _ = shared(teacher, "SSA", blocks=1, rank=2)  # layers 0, 1 and 3
    stage, text = Align(teacher, student, Align.Options(tokens=1, lr=1e-2)), batch()
    trained = stage.trained()
    assert len({id(parameter) for _, parameter in trained.values()}) == len(trained)
    assert sum("shared" in name for name in trained) == 4
    for _, parameter in trained.values():
        parameter.requires_grad_(True)
    base, single = student.mixers[3].q_proj.base, []
    for _, loss in stage.losses(text):
        single.append(torch.autograd.grad(loss, base)[0])
    for _, loss in stage.losses(text):
        loss.backward()
    assert len(single) == 3 and all(part.abs().sum() > 0 for part in single)
    assert torch.allclose(base.grad, sum(single), rtol=1e-4, atol=1e-7)
    optimizer = make_optimizer(trained, stage.options)
    assert sum(base is parameter for group in optimizer.param_groups for parameter in group["params"]) == 1
    before = base.clone()
    optimizer.step()
    assert not torch.equal(student.mixers[0].q_proj.base, before)
    assert student.mixers[0].q_proj.base is student.mixers[1].q_proj.base


def test_a_run_that_stops_goes_on_to_the_same_bits(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe |= {"pattern": "AS", "mixers": {"S": {"mixer": "shared_attention", "rank": 2}}}
    del tiny_recipe["stages"][1]  # nothing to orient
    whole = run(check(tiny_recipe, "here"), runs=tmp_path / "whole")
    stops = 0
    while True:
        steps = iter(range(1000))
        monkeypatch.setattr(Stopper, "due", lambda self, steps=steps: "enough" if next(steps) == 2 else None)
        try:
            parts = run(check(tiny_recipe, "here"), runs=tmp_path / "parts")
            break
        except Interrupted:
            stops += 1
    saved = [load_file(folder.student / "model.safetensors") for folder in (whole, parts)]
    assert stops >= 2 and saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
    assert sum("q_proj.shared" in name for name in saved[0]) == 1


def test_a_checkpoint_holds_the_block_once_and_brings_it_back_to_all(teacher):
    student, _ = shared(teacher, rank=2)
    kept = {name: tensor.clone() for name, tensor in checkpoint.student_tensors(student, set()).items()}
    assert sum("shared" in name for name in kept) == 4
    ids = torch.randint(1, 320, (1, 8))
    wanted = student(ids).logits
    with torch.no_grad():
        for mixer in student.mixers.values():
            for parameter in mixer.parameters():
                parameter.add_(0.1)
    assert not torch.allclose(student(ids).logits, wanted)
    checkpoint.restore_student(student, kept)
    assert torch.equal(student(ids).logits, wanted)
