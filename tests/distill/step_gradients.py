"""The gradients and losses of one optimizer step of a stage, in a process of its own."""

import json
import os
import subprocess
import sys

import yaml
from safetensors.torch import load_file

from tests.distill.two_processes import launcher

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
    script = [str(tmp_path / "one_step.py"), str(tmp_path / "tiny.yaml"), stage, str(out), str(batch), str(micro_batch)]
    done = subprocess.run(
        [sys.executable, *(launcher(processes) if processes > 1 else []), *script],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return load_file(out), json.loads((tmp_path / f"{out.name}.json").read_text())
