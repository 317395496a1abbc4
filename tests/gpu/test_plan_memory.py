"""What plans say of a stage's memory, against what its steps take on this GPU."""

import gc

import pytest
import torch

from distill.benchmarks import steps
from distill.footprint import Shape, footprint
from distill.loading import teacher_config
from distill.recipe_file import load
from distill.stages import stages_of
from distill.training.checks import check_fit
from teachers.families import family_of

pytestmark = pytest.mark.gpu

SMOLLM2, LLAMA = "smollm2-135m_mamba2-hybrid", "llama-3.2-1b_mamba2-hybrid"
IMITATE = {
    "all": [],
    "mixers+norms": ["stages.imitate.train=mixers+norms"],
    "lora": ["stages.imitate.train=lora"],
    "recomputed": ["stages.imitate.activation_checkpointing=true"],
    "selective": ["stages.imitate.activation_checkpointing=selective"],
}
CASES = [(recipe, stage, []) for recipe in (SMOLLM2, LLAMA) for stage in ("orient", "align")]
CASES += [(SMOLLM2, "imitate", ["stages.imitate.micro_batch=8", *more]) for more in IMITATE.values()]
CASES += [
    (LLAMA, "imitate", ["stages.imitate.micro_batch=2", "stages.imitate.activation_checkpointing=false", *more])
    for more in IMITATE.values()
]


@pytest.mark.parametrize(("name", "stage", "more"), CASES, ids=[f"{r[:5]} {s} {' '.join(m)}" for r, s, m in CASES])
def test_peaks_are_within_15_percent(name, stage, more):
    """Two micro-batches a step, so that gradients of one are there in the next; layers as they stand, not compiled."""
    recipe = load(name, more)
    entry = next(entry for entry in stages_of(recipe) if entry.name == stage)
    windows = entry.micro_batch(recipe.data)
    sizes = [f"stages.{stage}.compile=false", f"stages.{stage}.batch={2 * windows}", f"stages.{stage}.micro_batch={windows}"]
    recipe = load(name, [*more, *sizes])
    entry = next(entry for entry in stages_of(recipe) if entry.name == stage)
    gc.collect()
    torch.cuda.empty_cache()
    measured = steps._steps(recipe, entry, False)["gib"]

    layout = check_fit(recipe, steps.random_teacher(teacher_config(recipe), torch.device("meta"))).layout
    config = teacher_config(recipe)  # anew: making a model of it has changed its type
    family = family_of(config, name)
    predicted = footprint(Shape.of(recipe, config, family, layout), entry, recipe.data.seq_len, windows).peak / 2**30
    print(f"{name} {stage} {more}: measured {measured:.2f} GiB, predicted {predicted:.2f} ({predicted / measured - 1:+.1%})")
    assert predicted == pytest.approx(measured, rel=0.15)
