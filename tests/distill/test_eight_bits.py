"""`optimizer: adamw_8bit`: 8-bit moments learn as AdamW's do, take the bytes that plans state, and are restored from
checkpoints to the bit, in one process or in several."""

import io
import os
import subprocess
import sys

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import distill
from distill import moments
from distill.errors import Interrupted, UserError
from distill.plan_table import show
from distill.recipe_file import check
from distill.runs import checkpoint
from distill.runs.stopper import Stopper
from distill.training.shares import bytes_of
from distill.training.trainer import Trainer
from tests.conftest import tiny_entries
from tests.distill.eight_bits import EIGHT, installed
from tests.distill.sharded_steps import prepared
from tests.distill.two_processes import STOPPED, TWO


def quiet():
    return Console(file=io.StringIO(), width=400)


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory, tokenizer):
    """The folder of a random Llama whose matrices are large enough for moments of 8 bits, rows of 64 and 192 numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=320, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes, **rest)
    folder = tmp_path_factory.mktemp("wide teacher")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def entries_of(wide_teacher, text_files):
    """A recipe that trains everything, a checkpoint a step."""
    entries = tiny_entries(wide_teacher, text_files)
    imitate = {"tokens": 768, "lr": 1e-3, "train": "all", **EIGHT}
    entries["stages"] = [entries["stages"][0], {"align": {"tokens": 512, "lr": 3e-3, **EIGHT}}, {"imitate": imitate}]
    entries["evaluation"] |= {"passkey": [], "documents": 1}
    return entries | {"checkpoints": {"steps": 1, "keep": 20}}


@pytest.fixture
def entries(wide_teacher, text_files):
    """`entries_of`, a copy to change."""
    return entries_of(wide_teacher, text_files)


def with_adamw(entries):
    stages = [{name: {**options}} for stage in entries["stages"] for name, options in stage.items()]
    for stage in stages:
        for options in stage.values():
            options.pop("optimizer", None)
    return entries | {"stages": stages}


def losses(folder):
    return [(line["stage"], line["step"], line["loss"]) for line in folder.metrics()]


# plans


@installed
def test_plans_count_what_a_trainer_makes(entries, capsys):
    needs = {name: distill.plan(each, gpus=1) for name, each in (("8", entries), ("32", with_adamw(entries)))}
    session, student, stage = prepared(entries, EIGHT | {"train": "all"}, layers=2)
    trainer = Trainer(stage, session.accelerator, session.windows, 0, 4, 4)
    state = trainer.optimizer_state()
    made = sum(t.numel() * t.element_size() for name, t in state.items() if not name.endswith(("|step", ".qmap")))
    found, before = (needs[name].needs["imitate"].footprint for name in ("8", "32"))
    assert found.moments == made < 0.4 * before.moments and found.gradients == before.gradients
    assert needs["8"].bytes < needs["32"].bytes and needs["8"].numbers()["needs"]["imitate"]["optimizer"] == "adamw_8bit"
    names = set(trainer.parameters)
    narrow = {name.partition("|")[0] for name in state if name.endswith("exp_avg_sq.codes")}
    assert narrow >= {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    assert not any(moments.block_of(trainer.parameters[name].shape) is None for name in narrow)
    assert moments.wide_names(student, names) and narrow.isdisjoint(moments.wide_names(student, names))
    for name, said in (("8", "moments (8 bits) "), ("32", "moments ")):
        show(needs[name], check(entries, "tiny"), "tiny.yaml", Console(width=200))
        assert f"gradients 0.0, {said}0.0" in capsys.readouterr().out
    shares = [bytes_of(1e9, stage.Options(tokens=1, lr=1.0, **how)) for how in ({}, EIGHT)]
    assert shares == [16e9, pytest.approx(10.03e9, rel=1e-3)]


# runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory, wide_teacher, text_files):
    """The folder of a run of `entries` that nothing stopped."""
    return distill.run(entries_of(wide_teacher, text_files), runs=tmp_path_factory.mktemp("alone"), console=quiet())


@installed
def test_a_run_learns_as_with_adamw(entries, alone, tmp_path):
    other = distill.run(with_adamw(entries), runs=tmp_path, console=quiet())
    assert alone.path.name != other.path.name
    wide, narrow = losses(other), losses(alone)
    assert [line[:2] for line in wide] == [line[:2] for line in narrow] and len(wide) > 8 and wide != narrow
    assert [line[2] for line in narrow] == pytest.approx([line[2] for line in wide], rel=0.005)
    aligned = [line[2] for line in narrow if line[0] == "align"]
    assert aligned[-1] < 0.9 * aligned[0]


@installed
@pytest.mark.parametrize("steps", [2, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(entries, alone, tmp_path, monkeypatch, steps):
    asked = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == steps else None)
        distill.run(entries, runs=tmp_path, console=quiet())
    (folder,) = tmp_path.glob("tiny-*")
    newest = checkpoint.latest(folder / "checkpoints")
    names = set(load_file(newest / "optimizer.safetensors"))
    assert any(name.endswith("|exp_avg.codes") for name in names)
    done = distill.run(entries, runs=tmp_path, console=quiet())
    assert losses(done) == losses(alone)
    found, wanted = (load_file(run.student / "model.safetensors") for run in (done, alone))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@installed
def test_two_processes_that_divide_and_one_that_goes_on(entries, alone, tmp_path):
    """Stopped in imitate, whose masters, gradients and moments two processes divide."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(entries | {"shard": "student"}))
    (tmp_path / "stopped.py").write_text(STOPPED.replace("== 2", "== 6"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *TWO, str(tmp_path / "stopped.py"), str(tmp_path / "tiny.yaml"), str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").glob("tiny-*")
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest.name.startswith("2-imitate-000") and checkpoint.read_state(newest).processes == 2
    held = load_file(newest / "optimizer-00002-of-00002.safetensors")
    assert held["model.embed_tokens.weight|exp_avg.codes"].shape == (160, 64)
    assert held["model.embed_tokens.weight|exp_avg.scale"].shape == (160, 1)
    gone_on = distill.run(entries, runs=tmp_path / "runs", console=quiet())
    assert gone_on.path == folder
    found, wanted = losses(gone_on), losses(alone)
    assert [line[:2] for line in found] == [line[:2] for line in wanted]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in wanted], rel=1e-4)


# refusals


@pytest.mark.parametrize("twice", [False, True])
def test_without_torchao(tiny_recipe, tmp_path, monkeypatch, twice):
    monkeypatch.setattr("distill.moments.find_spec", lambda name: None)
    tiny_recipe["stages"][2]["align"] |= EIGHT
    tiny_recipe["stages"] += [{"align": {"tokens": 64, "lr": 1e-3}}] if twice else []
    recipe, key = check(tiny_recipe, "tiny.yaml"), "2" if twice else "align"
    said = rf"^tiny: stages.{key}.optimizer is 'adamw_8bit', which needs torchao, .*: pip install 'distill-hybrids\[int8\]'$"
    for verb in (lambda: distill.plan(recipe), lambda: distill.run(recipe, runs=tmp_path)):
        with pytest.raises(UserError, match=said):
            verb()
    assert not list(tmp_path.iterdir())


def test_of_an_old_torchao(tiny_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr("distill.moments.find_spec", lambda name: name)
    tiny_recipe["stages"][2]["align"] |= EIGHT
    with pytest.raises(UserError, match=r"stages.align.optimizer is 'adamw_8bit', .*version 0.15 or newer"):
        distill.plan(tiny_recipe)


def test_names_of_optimizers(tiny_recipe):
    tiny_recipe["stages"][2]["align"]["optimizer"] = "adam8"
    with pytest.raises(UserError, match=r"stages.align.*optimizer.*'adamw' or 'adamw_8bit'"):
        check(tiny_recipe, "tiny.yaml")


def test_recipes_that_do_not_use_it_keep_their_runs(tiny_recipe):
    before = check(tiny_recipe, "tiny.yaml")
    assert "optimizer" not in before.yaml() and "optimizer" not in str(before.stages)
    tiny_recipe["stages"][2]["align"] |= EIGHT
    assert check(tiny_recipe, "tiny.yaml").fingerprint != before.fingerprint
