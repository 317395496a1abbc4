"""The switched model, in which each layer keeps its attention or takes its stand-in."""

import pytest
import torch

from distill.errors import UserError
from distill.selection.switched import SwitchedHeads, make_switched
from tests.distill.selection.planted import HEAD, LAYER, LAYERS, chosen_by, opened


def test_nothing_switched_is_the_teacher(entries):
    session, options = opened(entries)
    batch = session.heldout_windows.batch(0, 2)
    switched, teacher = make_switched(session, options), session.teacher
    wanted = teacher.hidden(batch.ids, batch.positions)
    with torch.no_grad():
        assert torch.equal(switched.keep(range(LAYERS)).hidden(batch.ids, batch.documents), wanted)
        assert not torch.equal(switched.keep([0]).hidden(batch.ids, batch.documents), wanted)
        assert torch.equal(switched.keep([LAYER]).hidden(batch.ids, batch.documents), wanted)  # the others add nothing
        for windows in (False, True):
            heads = SwitchedHeads(teacher, options, windows)
            torch.testing.assert_close(heads.keep({}).hidden(batch.ids, batch.documents), wanted, rtol=1e-4, atol=1e-4)
            off = heads.keep({LAYER: [1 - HEAD]}).hidden(batch.ids, batch.documents)
            assert not torch.allclose(off, wanted, rtol=1e-2, atol=1e-2)


def test_a_gate_mixes(entries):
    session, options = opened(entries)
    switched, batch = make_switched(session, options), session.heldout_windows.batch(0, 1)
    with torch.no_grad():
        ends = [switched.keep(kept).hidden(batch.ids, batch.documents) for kept in (range(LAYERS), [])]
        for gate, wanted in zip((1.0, 0.0), ends, strict=True):
            found = switched.mix([torch.tensor(gate)] * LAYERS).hidden(batch.ids, batch.documents)
            torch.testing.assert_close(found, wanted)


def test_the_recipes_own_mixers_can_stand_in(entries, tmp_path):
    chosen = chosen_by(entries, tmp_path, stand_in="mixer", by="kl")
    assert chosen["ranking"][0]["name"] == str(LAYER) and chosen["layers"] == [0, LAYER]


def test_mixers_that_cannot_be_switched_one_by_one(entries, tmp_path):
    window = {"mixer": "attention", "window": 8}
    entries["mixers"] = {"W": window, "X": {**window, "share_kv": True}}
    with pytest.raises(UserError, match=r"a mixer shares another layer's keys and values.*use stand_in: window"):
        chosen_by(entries, tmp_path, rest="WX", stand_in="mixer")
