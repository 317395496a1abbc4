"""What cached logits lose against the whole distribution: in gradients and in KL, by the number of likeliest tokens.

python -m tests.cached_logits [RECIPE] [KEY=VALUE]... > table.md

The student of a recipe's stages before imitate runs imitate several times: with the teacher online, and from a cache of the
512 likeliest tokens, of which each row uses fewer. Every row sees the same tokens in the same order.
"""

import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import torch
from rich.console import Console

import distill
from distill.build import build
from distill.evaluation.fidelity import fidelity
from distill.logits.reader import Known, LogitCache
from distill.recipe_file import load
from distill.runs.session import Session
from distill.stages import StageEntry
from distill.stages.stage import Stage
from distill.stages.targets import Cached, Online
from distill.training.caches import Reading, readings
from distill.training.checks import check_fit
from distill.training.trainer import Trainer
from students.config import Layout

MOST, KEPT, ORDER = 512, (8, 32, 128, 512), (128, 8, 32, 512)
BATCHES = 4  # of gradients that are compared


class Fewer(Cached):
    """A cache of which only the first k tokens are used; the others go to the rest."""

    def __init__(self, cache: LogitCache, k: int) -> None:
        super().__init__(cache)
        self.k = k

    def see(self, batch, layers=()) -> Known:
        ids, logs, rest = super().see(batch, layers)
        logs, rest = logs.float(), rest.float()
        if self.k < MOST:
            rest = torch.logaddexp(rest, logs[..., self.k :].logsumexp(-1))
        return Known(ids[..., : self.k], logs[..., : self.k], rest)


def start_of(session: Session, heads: list[Reading]) -> dict[int, dict]:
    """The mixers' weights behind the stages before the last one."""
    student, transfers = student_of(session)
    for reading in heads:
        entry = reading.entry
        stage = entry.make(session.teacher, student, transfers)
        stage.prepare()
        stage.begin(session.calibration(reading.first, reading.windows))
        if stage.trains and stage.trained():
            trainer = trainer_of(session, stage, reading)
            for step in range(trainer.steps):
                trainer.step(step)
        stage.finish(session.calibration(reading.first, reading.windows))
    return {layer: deepcopy(mixer.state_dict()) for layer, mixer in student.mixers.items()}


def student_of(session: Session):
    """A student of the recipe's layout, as it is built."""
    recipe = session.recipe
    return build(session.teacher, Layout.over(session.teacher.n_layers, recipe.pattern, recipe.mixers, recipe.meta_tokens))


def trainer_of(session: Session, stage: Stage, reading: Reading) -> Trainer:
    """What takes a stage's steps."""
    data, entry = session.recipe.data, reading.entry
    sizes = entry.batch(data), entry.micro_batch(data)
    return Trainer(stage, session.accelerator, reading.windows, reading.first, *sizes)


def made(session: Session, start: dict, entry: StageEntry, k: int | None, cache: LogitCache) -> Stage:
    """The stage on a fresh copy of the student. k: tokens of the cache; None has the teacher beside it."""
    student, _ = student_of(session)
    for layer, mixer in student.mixers.items():
        mixer.load_state_dict(start[layer])
    stage = entry.make(session.teacher, student)
    if k is not None:
        stage.learn_from(Fewer(cache, k))
    stage.prepare()
    return stage


def gradient(stage: Stage, batch) -> torch.Tensor:
    """The whole gradient of a batch's loss, as one vector."""
    (_, loss) = next(iter(stage.losses(batch)))
    parameters = [parameter for _, parameter in stage.trained().values()]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def main() -> None:
    """Print the table."""
    given = sys.argv[1:] or ["quickstart"]
    recipe = load(given[0], given[1:])
    with tempfile.TemporaryDirectory() as place:
        folder = distill.cache(recipe, out=Path(place) / "logits", top_k=MOST, console=Console(stderr=True))
        session = Session.open(recipe)
        *heads, reading = readings(session, check_fit(recipe, session.teacher).students)
        start = start_of(session, heads)
        heldout, cache = session.heldout(recipe.evaluation.tokens), LogitCache(folder, "the cache")
        begun = fidelity(session.teacher, made(session, start, reading.entry, None, cache).student, heldout)["kl"]
        errors = gradient_errors(session, start, reading, cache)
        print("| likeliest tokens | bytes a token | gradient off by |\n|---|---|---|")
        for k in KEPT:
            size = k * (2 + int(cache.facts.ids[4:]) // 8) + 2
            print(f"| {k} | {size:,} | {errors[k]:.1%} |", flush=True)
        print(f"\nheld-out KL before: {begun:.4f}\n")
        print("| learns from | held-out KL | tokens/s | GiB |\n|---|---|---|---|", flush=True)
        for k in (None, *ORDER):
            kl, speed, held = trained(session, start, reading, k, cache, heldout)
            name = "the whole distribution, teacher beside it" if k is None else f"{k} likeliest tokens and the rest, cached"
            print(f"| {name} | {kl:.4f} | {speed:,.0f} | {held} |", flush=True)


def gradient_errors(session, start, reading, cache) -> dict[int | None, float]:
    """|g_k - g| / |g|, mean over batches: g of the whole distribution."""
    totals = dict.fromkeys((None, *KEPT), 0.0)
    stage = made(session, start, reading.entry, None, cache)
    size = reading.entry.batch(session.recipe.data)
    for number in range(BATCHES):
        batch = session.windows.batch(reading.first + number * size, size).to(session.accelerator.device)
        whole = None
        for k in totals:
            if k is not None:
                stage.learn_from(Fewer(cache, k))
            with session.accelerator.autocast():
                found = gradient(stage, batch)
            whole = found if whole is None else whole
            totals[k] += ((found - whole).norm() / whole.norm()).item() / BATCHES
        stage.learn_from(Online(session.teacher))
    return totals


def trained(session, start, reading, k, cache, heldout) -> tuple[float, float, str]:
    """The held-out KL after the stage, the tokens a second of its steps after the first, and the GPU's peak in GiB."""
    torch.manual_seed(0)
    on_gpu = session.accelerator.device.type == "cuda"
    stage = made(session, start, reading.entry, k, cache)
    if k is not None:
        session.teacher.model.to("cpu")  # a cache needs none
    trainer = trainer_of(session, stage, reading)
    trainer.step(0)  # compiles
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    for step in range(1, trainer.steps):
        trainer.step(step)
    if on_gpu:
        torch.cuda.synchronize()
    speed = (trainer.steps - 1) * trainer.batch * session.windows.seq_len / (time.monotonic() - began)
    held = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else "-"
    session.teacher.model.to(session.accelerator.device)
    return fidelity(session.teacher, stage.student, heldout)["kl"], speed, held


if __name__ == "__main__":
    main()
