"""Hymba's block: what it computes, how near attention it starts, and what it refuses."""

import pytest
import torch

from distill.build import build
from distill.evaluation.baselines import has_window_branch, twin_layout
from distill.stages.initialise import Initialise
from distill.text.windows import Batch
from students.config import Layout
from students.mixers import make_mixer
from students.mixers.mixer import Context
from tests.students.mixer_cases import SHAPE, close, context, made


def test_it_is_the_mean_of_the_normalised_branches():
    mixer, h, _ = made("parallel_heads", {"window": 7, "sinks": 2})
    branches = []
    for branch in (mixer.ssm, mixer.attention):
        y = branch.features(branch.mix(branch.project(h, context()), context()), h)
        rms = (y.square().mean((2, 3), keepdim=True) + SHAPE.norm_eps).sqrt()
        branches.append((y / rms, branch.out_weight()[0]))
    betas = mixer.beta.split([len(weight) for _, weight in branches])
    terms = [torch.einsum("btkp,kdp->btd", y * beta, w) for (y, w), beta in zip(branches, betas, strict=True)]
    close(mixer(h, context()), (terms[0] + terms[1]) / 2)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ssm", ["discrete_mamba2", "mamba2"])
def test_it_starts_near_the_attention(teacher, ssm, norm):
    """What the least squares leave of a layer's output is what the norm costs; without one, nothing is lost."""
    layout = Layout.over(4, "P", {"P": {"mixer": "parallel_heads", "ssm": {"mixer": ssm}, "norm": norm}})
    student, transfers = build(teacher, layout)
    ids = torch.randint(1, 320, (4, 33))
    documents, positions = torch.zeros(4, 32, dtype=torch.long), torch.arange(32).expand(4, -1)
    batch = Batch(ids[:, :-1], documents, positions, ids[:, 1:], torch.ones(4, 32), documents)
    Initialise(teacher, student, Initialise.Options(tokens=1), transfers).begin(lambda tokens: iter([batch]))
    for seen in teacher.observe(batch.ids, batch.positions, layout.converted):
        y = student.mixers[seen.layer](seen.input, Context(documents, seen.rope))
        error = (y - seen.output).square().sum() / seen.output.square().sum()
        assert error < (0.2 if norm else 1e-4)


def test_its_baseline_is_its_attention_alone():
    layout = Layout.over(
        2, "PF", {"P": {"mixer": "parallel_heads", "window": 8, "sinks": 2}, "F": {"mixer": "parallel_heads"}}
    )
    assert twin_layout(layout).mixers == {
        "P": {"mixer": "attention", "window": 8, "sinks": 2},
        "F": {"mixer": "attention"},
    }
    assert has_window_branch(layout)
    assert not has_window_branch(Layout.over(2, "W", {"W": {"mixer": "attention", "window": 8}}))


def test_mistakes_are_named():
    for ssm in ({"mixer": "attention"}, {"mixer": "mamba2", "window": {"size": 4}}, {"mixer": "parallel_heads"}):
        with pytest.raises(ValueError, match="which has attention; name an SSM mixer without a window"):
            make_mixer("parallel_heads", SHAPE, {"ssm": ssm})
    with pytest.raises(ValueError, match="ssm of parallel_heads names no mixer"):
        make_mixer("parallel_heads", SHAPE, {"ssm": {"d_state": 16}})
    with pytest.raises(ValueError, match="no option 'd_stat'; did you mean 'd_state'"):
        make_mixer("parallel_heads", SHAPE, {"ssm": {"mixer": "mamba2", "d_stat": 16}})
    with pytest.raises(ValueError, match="which is no int"):
        make_mixer("parallel_heads", SHAPE, {"window": {"size": 4}})
