"""The losses of tune and prefer equal TRL's on the same models and batch; `tests/trl_losses.py` says how TRL's were made."""

import json

import pytest
import torch

import teachers
from distill.build import build
from distill.stages.prefer import Prefer
from distill.stages.tune import Tune
from distill.text.windows import Batch
from students.config import Layout
from tests import trl_losses

STORED = json.loads(trl_losses.FILE.read_text())["losses"]
ORDER = [0, 2, 1, 3]  # TRL has the chosen ones first, here a pair's two follow each other


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """TRL's model as a student that keeps its attention, and its reference as a teacher."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(str(seed))
        trl_losses.model(seed).save_pretrained(folder)
        trl_losses.tokenizer().save_pretrained(folder)
        found.append(teachers.load(str(folder)))
    return build(found[0], Layout("AA"))[0], found[1]


def ours():
    """TRL's batch as windows."""
    given = {name: tensor[ORDER] for name, tensor in trl_losses.batch().items()}
    ids, mask = given["input_ids"], given["completion_mask"]
    time = torch.arange(ids.shape[1]).expand_as(ids)
    ended = torch.zeros(len(ids), 1, dtype=ids.dtype)
    trained, weights = (torch.cat([given[name][:, 1:], ended], 1).float() for name in ("completion_mask", "attention_mask"))
    documents = 1 - given["attention_mask"]
    labels, targets = -documents, torch.cat([ids[:, 1:], ended], 1)
    assert mask.sum() == trained.sum()
    return Batch(ids, documents, time, targets, weights, labels, torch.arange(len(ids)), trained)


def losses(models):
    """Of each of TRL's names."""
    (student, teacher), batch, found = models, ours(), {}
    for name, options in trl_losses.DPO.items():
        data = [{"path": "unread.jsonl"}]
        stage = Prefer(teacher, student, Prefer.Options(tokens=1, lr=1e-3, reference="teacher", data=data, **options))
        stage.refer_to(stage.reference_log_probabilities(batch), [])
        ((_, found[name]),) = stage.losses(batch)
    ((_, found["sft"]),) = Tune(teacher, student, Tune.Options(tokens=1, lr=1e-3)).losses(batch)
    return {name: loss.item() for name, loss in found.items()}


def test_losses_are_those_of_trl(models):
    assert losses(models) == pytest.approx(STORED, rel=1e-5)


@pytest.mark.ecosystem
def test_trl_gives_what_is_stored(models):
    """TRL itself, where it is installed: `make test-trl`."""
    pytest.importorskip("trl")
    found = trl_losses.losses()
    assert found == pytest.approx(STORED, rel=1e-5) and losses(models) == pytest.approx(found, rel=1e-5)
