"""Pairs of answers, the stage `prefer` over them, and a script that takes its gradients in any number of processes."""

import torch


def pair(number):
    """A pair in one of the forms that are read."""
    asked = [{"role": "user", "content": f"what {number}?"}]
    good = [{"role": "assistant", "content": f"the sea {number} " * (1 + number % 3)}]
    bad = [{"role": "assistant", "content": f"stones {number}"}]
    forms = [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"chosen": asked + good, "rejected": asked + bad},
        {"prompt": f"what {number}?", "chosen": asked + good, "rejected": asked + bad},
        {"prompt": f"what {number}? ", "chosen": good[0]["content"], "rejected": bad[0]["content"]},
    ]
    return forms[number % 4]


def windows_of(session):
    return next(iter(session.stage_texts().values()))


def told(stage, windows):
    """A stage that knows what the teacher says of every window."""
    stage.prepare()
    whole = range(windows.count)
    known = stage.reference_log_probabilities(windows.at(whole))
    stage.refer_to(torch.cat([known, torch.zeros(len(windows.held))]), [])
    return stage


def log_ratio(session, student, batch, row):
    """Of one window by hand: the sum over its answer, and the answer's tokens."""
    total, count = 0.0, 0
    ours = (student.hidden(batch.ids, batch.documents) @ student.get_output_embeddings().weight.T).log_softmax(-1)
    model = session.teacher.model.get_output_embeddings().weight.T
    theirs = (session.teacher.hidden(batch.ids, batch.positions) @ model).log_softmax(-1)
    for place in range(batch.ids.shape[1]):
        if batch.trained[row, place]:
            token = batch.targets[row, place]
            total += (ours[row, place, token] - theirs[row, place, token]).item()
            count += 1
    return total, count


SCRIPT = """
import sys
from pathlib import Path
import yaml
from safetensors.torch import save_file
from distill.build import build
from distill.recipe_file import check
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.stages import stages_of
from distill.training.caches import Reading
from distill.training.references import lay_down
from distill.training.trainer import Trainer
from students.config import Layout

place = Path(sys.argv[1])
recipe = check(yaml.safe_load((place / "r.yaml").read_text()), "here")
session = Session.open(recipe)
student, _ = build(session.teacher, Layout("AMAM", {"M": recipe.mixers["M"]}))
entry = stages_of(recipe)[1]
stage, text = entry.make(session.teacher, student), session.windows_of(entry)
stage.prepare()
lay_down(session, RunDir(place), stage, Reading.of(recipe, entry, student, text, 0), resumed=False)
trainer = Trainer(stage, session.accelerator, text, 0, entry.batch(recipe.data), entry.micro_batch(recipe.data))
trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **keywords: None
loss = trainer.step(0).losses["loss"]
if session.accelerator.is_main_process:
    found = {name: p.grad.contiguous() for name, p in trainer.parameters.items() if p.grad is not None}
    save_file(found, place / "found.safetensors", {"loss": repr(loss)})
session.accelerator.wait_for_everyone()
session.accelerator.end_training()
"""
