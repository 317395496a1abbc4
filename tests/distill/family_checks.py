"""Checks of a family of teachers: its stages, packed documents and generation."""

import torch

from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.initialise import Initialise
from distill.stages.orient import Orient
from distill.text.windows import Batch
from students.mixers import MIXERS as TABLE

MIXERS = {
    "discrete": {"mixer": "discrete_mamba2"},
    "discrete, wide window": {"mixer": "discrete_mamba2", "window": {"size": 6, "sinks": 2}},
    "stock": {"mixer": "mamba2"},
    "gated DeltaNet": {"mixer": "gated_deltanet"},
    "RetNet": {"mixer": "retention"},
    "GLA": {"mixer": "gla"},
    "Longhorn": {"mixer": "longhorn"},
    "stock, 1 group, small state": {"mixer": "mamba2", "n_groups": 1, "d_state": 4, "expand": 1},
    "mamba": {"mixer": "mamba1"},
    "griffin": {"mixer": "rg_lru"},
    "window": {"mixer": "attention", "window": 5, "sinks": 2},
    "Taipan": {"mixer": "mamba2", "window": {"size": 6, "sinks": 0, "lag": False, "gate": "select"}},
    "shared attention": {"mixer": "shared_attention", "rank": 4},
    "split heads": {"mixer": "split_heads", "keep": {1: [0, 1, 5]}},
    "parallel heads": {
        "mixer": "parallel_heads",
        "window": 6,
        "sinks": 2,
        "ssm": {"mixer": "discrete_mamba2", "d_state": 4},
    },
}
MIXERS |= {name: {"mixer": name} for name in TABLE if name not in {options["mixer"] for options in MIXERS.values()}}
WORDS = 96


def text(rows=2, time=20):
    """Rows of two packed documents."""
    documents = torch.zeros(rows, time, dtype=torch.long)
    documents[:, 8:] = 1
    positions = torch.cat([torch.arange(8), torch.arange(time - 8)]).expand(rows, -1)
    ids, weights = torch.randint(1, WORDS, (rows, time + 1)), torch.ones(rows, time)
    weights[:, 7] = 0
    return Batch(ids[:, :-1], documents, positions, ids[:, 1:], weights, documents)


def run_stages(teacher, student, transfers, batch):
    """Initialise, then two steps of each training stage that the mixer takes part in."""

    def calibration(tokens):
        return iter([batch])

    Initialise(teacher, student, Initialise.Options(tokens=1), transfers).begin(calibration)
    used, there = transfers[1].used, set(teacher.attention_weights(1).named())
    assert used == there - student.mixers[1].ignores, f"not taken over: {there - used}"
    for kind in (Orient, Align, Imitate):
        options = kind.Options(tokens=1, lr=1e-3, **({"train": "mixers"} if kind is Imitate else {}))
        stage = kind(teacher, student, options)
        stage.prepare()
        parameters = [parameter.requires_grad_(True) for _, parameter in stage.trained().values()]
        if not parameters:
            assert kind is Orient and not student.mixers[1].orientable
            continue
        stage.begin(calibration)
        optimizer = torch.optim.Adam(parameters, 1e-3)
        for _ in range(2):
            for _, loss in stage.losses(batch):
                assert loss.isfinite()
                loss.backward()
            assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
            optimizer.step()
            optimizer.zero_grad()
        stage.finish(calibration)
    student.requires_grad_(False)


@torch.no_grad()
def check_documents(student, batch):
    """Packed documents do not see each other."""
    packed = student.hidden(batch.ids, batch.documents)
    for piece in (slice(0, 8), slice(8, 20)):
        alone = student.hidden(batch.ids[:, piece], None)
        assert torch.allclose(packed[:, piece], alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def check_generation(student):
    """A cached step is the whole forward; a prompt padded on the left is the prompt."""
    ids = torch.randint(1, WORDS, (1, 9))
    logits, cache = student(ids).logits, student.new_cache()
    pieces = [student(ids[:, start:stop], past_key_values=cache).logits for start, stop in ((0, 5), (5, 6), (6, 9))]
    assert torch.allclose(torch.cat(pieces, 1), logits, atol=1e-4, rtol=1e-3)
    other = torch.randint(1, WORDS, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), other], 1)
    mask = torch.cat([torch.ones(1, 9), (torch.arange(9) >= 3)[None]]).long()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    both = student.generate(
        torch.cat([ids, padded]), attention_mask=mask, return_dict_in_generate=True, pad_token_id=0, **options
    )
    for row, prompt in enumerate((ids, other)):
        alone = student.generate(prompt, return_dict_in_generate=True, pad_token_id=0, **options)
        for found, wanted in zip(both.logits, alone.logits, strict=True):
            assert torch.allclose(found[row], wanted[0], atol=1e-4, rtol=1e-3)
        assert torch.equal(both.sequences[row, 9:], alone.sequences[0, prompt.shape[1] :])
