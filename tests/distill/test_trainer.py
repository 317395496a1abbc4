"""The training loop: two processes give one process's gradients; micro-batches change nothing; schedules and groups."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.training.optim import make_optimizer, rate_factor

# One optimizer step's gradients and losses of a stage, in a process of its own.
SCRIPT = """
import json, sys, yaml
from safetensors.torch import save_file
from distill.build import build, layout_of
from distill.recipe_file import check
from distill.runs.session import Session
from distill.stages import stage_class
from distill.training.trainer import Trainer

recipe = check(yaml.safe_load(open(sys.argv[1])), "tiny.yaml")
name, out, batch, micro_batch = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
session = Session.open(recipe)
student, _ = build(session.teacher, layout_of(recipe.pattern, recipe.mixers, 4, "tiny.yaml"))
kind = stage_class(name)
stage = kind(session.teacher, student, kind.Options(tokens=1, lr=1e-3, clip=None))
stage.prepare()
stage.begin(lambda tokens: [session.windows.batch(0, 2)])
trainer = Trainer(stage, session.accelerator, session.windows, 0, batch, micro_batch)
trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **keywords: None  # the gradients are looked at
losses = trainer.step(0).losses
if session.accelerator.is_main_process:
    save_file({n: p.grad.contiguous() for n, p in trainer.parameters.items() if p.grad is not None}, out)
    json.dump(losses, open(out + ".json", "w"))
session.accelerator.wait_for_everyone()
session.accelerator.end_training()
"""


def gradients(tmp_path, entries, stage, *, processes, batch=4, micro_batch=4):
    """Run the script in so many gloo processes; gradients and losses of the first."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "one_step.py").write_text(SCRIPT)
    out = tmp_path / f"{stage}-{processes}-{micro_batch}.safetensors"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    script = [str(tmp_path / "one_step.py"), str(tmp_path / "tiny.yaml"), stage, str(out), str(batch), str(micro_batch)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *script],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return load_file(out), json.loads((tmp_path / f"{out.name}.json").read_text())


@pytest.mark.parametrize("stage", ["orient", "align", "imitate"])
def test_two_processes_and_micro_batches_give_one_process_gradients(tmp_path, tiny_recipe, stage):
    whole, losses = gradients(tmp_path, tiny_recipe, stage, processes=1)
    assert any(gradient.abs().max() > 1e-6 for gradient in whole.values())
    for processes, micro_batch in ((2, 2), (1, 1), (2, 1)):
        found, found_losses = gradients(tmp_path, tiny_recipe, stage, processes=processes, micro_batch=micro_batch)
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            scale = gradient.abs().max().clamp_min(1.0)
            assert (found[name] - gradient).abs().max() <= 1e-6 * scale, (name, processes, micro_batch)
        assert found_losses == pytest.approx(losses, rel=1e-5)


def options(**changes):
    return Align.Options(**{"tokens": 1, "lr": 1e-3, **changes})


def test_schedules():
    wsd = [rate_factor(step, 100, options(warmup=0.1, decay=0.2)) for step in range(100)]
    assert wsd[0] == pytest.approx(1 / 11) and wsd[9] == pytest.approx(10 / 11)
    assert set(wsd[10:80]) == {1.0} and wsd[80] < 1 and wsd[99] == pytest.approx(1 / 21)
    assert all(a >= b for a, b in itertools.pairwise(wsd[10:]))
    cosine = [rate_factor(step, 100, options(schedule="cosine", warmup=0.0, final=0.1)) for step in range(100)]
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.55, abs=1e-3) and 0.1 < cosine[99] < 0.11
    assert {rate_factor(step, 10, options(schedule="constant", warmup=0.0)) for step in range(10)} == {1.0}
    assert rate_factor(0, 1, options()) > 0


def test_groups():
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    trained = {"a": ("ssm", matrix), "b": ("new", torch.nn.Parameter(torch.zeros(2, 2))), "c": ("ssm", vector)}
    optimizer = make_optimizer(trained, options(lr={"ssm": 1e-3, "new": 2e-3}))
    groups = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert groups == {(2e-3, 0.0): 1, (1e-3, 0.0): 1, (1e-3, 0.1): 1}
    with pytest.raises(ValueError, match="this stage also trains 'new' parameters"):
        make_optimizer(trained, options(lr={"ssm": 1e-3}))


def test_imitate_names_roles(teacher):
    from distill.build import build
    from students.config import Layout

    student, _ = build(teacher, Layout("AMAM", {"M": {"mixer": "discrete_mamba2", "window": {"size": 4}}}))
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1.0, train="all"))
    roles = {role for role, _ in stage.trained().values()}
    assert roles == {"new", "ssm", "window", "norms", "rest"}
    by_name = {name: role for name, (role, _) in stage.trained().items()}
    assert by_name["model.norm.weight"] == by_name["model.layers.0.input_layernorm.weight"] == "norms"
    assert by_name["model.embed_tokens.weight"] == "rest" and "lm_head.weight" not in by_name
