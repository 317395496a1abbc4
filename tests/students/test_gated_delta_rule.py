"""The gated delta rule against its definition, and the check that a foreign kernel must pass before it runs."""

import itertools

import pytest
import torch

from students import kernels
from students.kernels import fla, trial
from students.kernels.gated_delta_rule import cases, gated_delta_rule, gated_delta_rule_step, reference_rule
from students.kernels.gated_delta_rule.reference import gated_delta_recurrence
from tests.conftest import TOLERANCE
from tests.students.op_checks import assert_close, assert_same_gradients


def inputs(case, dtype=torch.float64):
    leaves, fixed = cases.draw(case, dtype, "cpu")
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}, fixed


@pytest.mark.parametrize("case", cases.TEST, ids=str)
def test_gated_delta_rule(case):
    leaves, fixed = inputs(case)
    found, wanted = gated_delta_rule(**leaves, **fixed), gated_delta_recurrence(**leaves, **fixed)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, tuple(leaves.values()))


def test_states_join_pieces_and_steps():
    leaves, fixed = inputs(cases.TEST[3])
    leaves = {name: leaf.detach() for name, leaf in leaves.items()}
    state = leaves.pop("initial_state")
    documents = torch.zeros_like(fixed["documents"])
    wanted, last = gated_delta_rule(**leaves, documents=documents, initial_state=state)
    pieces = []
    for start, stop in ((0, 70), (70, 71), (71, 198)):
        piece = {name: leaf[:, start:stop] for name, leaf in leaves.items()}
        y, state = gated_delta_rule(**piece, initial_state=state)
        pieces.append(y)
    for t in (198, 199):
        y, state = gated_delta_rule_step(**{name: leaf[:, t] for name, leaf in leaves.items()}, state=state)
        pieces.append(y[:, None])
    assert_close(torch.cat(pieces, 1), wanted)
    assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    leaves, fixed = inputs(cases.TEST[3], dtype)
    y, final = gated_delta_rule(**leaves, **fixed)
    wanted, wanted_final = gated_delta_recurrence(**leaves, **fixed)
    assert y.dtype == dtype and final.dtype == torch.float32
    assert_close(y.double(), wanted, TOLERANCE[dtype])
    assert_close(final.double(), wanted_final, TOLERANCE[torch.float32])


def test_extreme_decays_and_equal_keys():
    """Decays to nothing, and the same key at every token with beta = 1, where powers of the system's matrix explode."""
    leaves, fixed = inputs(cases.Case(1, 200, 1, 1, 4, 8, False), torch.float32)
    leaves["k"] = leaves["k"][:, :1].detach().expand(-1, 200, -1, -1).clone().requires_grad_()
    leaves["beta"] = torch.ones(1, 200, 1, requires_grad=True)
    for decay in (0.0, -300.0):
        leaves["log_a"] = torch.full((1, 200, 1), decay, requires_grad=True)
        y, final = gated_delta_rule(**leaves, **fixed)
        assert_close(y.double(), gated_delta_recurrence(**leaves, **fixed)[0], TOLERANCE[torch.float32])
        gradients = torch.autograd.grad(y.sum() + final.sum(), list(leaves.values()))
        assert all(torch.isfinite(part).all() for part in gradients)


def test_key_heads_that_do_not_divide_are_refused():
    leaves, _ = inputs(cases.Case(1, 2, 4, 3, 2, 2, False))
    with pytest.raises(ValueError, match="4 heads cannot share 3 key heads"):
        gated_delta_rule(**leaves)
    with pytest.raises(ValueError, match="4 heads cannot share 3 key heads"):
        gated_delta_rule_step(
            **{name: leaf[:, 0] for name, leaf in leaves.items() if name != "initial_state"}, state=leaves["initial_state"]
        )


# fla-core's kernels


def test_a_right_kernel_agrees():
    errors = trial.disagreement(
        reference_rule, gated_delta_recurrence, cases.draw, cases.check(8, 8), torch.float32, torch.device("cpu")
    )
    assert set(errors) > {"output", "final state", "gradient of k", "gradient of log_a"}
    assert max(errors.values()) < trial.TOLERANCE[torch.float32]


def test_a_wrong_gradient_is_found_and_random_numbers_go_on_as_before():
    def wrong(k, **others):
        return reference_rule(k=k + 0.1 * (k - k.detach()), **others)  # right outputs, gradients of k 10 % too large

    case, before = cases.check(8, 8), torch.get_rng_state()
    with torch.no_grad():
        errors = trial.disagreement(wrong, reference_rule, cases.draw, case, torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert errors["gradient of k"] == pytest.approx(0.1, rel=1e-3)
    assert max(error for name, error in errors.items() if name != "gradient of k") < 1e-5


def test_documents_as_sequences():
    """What fla's kernels are handed for packed rows, and what is made of their answer."""
    leaves, fixed = inputs(cases.TEST[3])
    rows = {name: torch.cat([leaf.detach()] * 2) for name, leaf in leaves.items()}
    documents = torch.cat([fixed["documents"], torch.zeros_like(fixed["documents"])])

    def theirs(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
        assert scale == 1.0 and output_final_state and v.shape[:2] == (1, 400)
        outputs, finals = [], []
        for sequence, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
            q_, k_, v_, g_, b_ = (part[:, start:stop] for part in (q, k, v, g, beta))
            state = initial_state[sequence, None].transpose(2, 3)
            y, final = gated_delta_recurrence(q_, k_, v_, g_, b_, None, state)
            outputs.append(y)
            finals.append(final.transpose(2, 3))
        return torch.cat(outputs, 1), torch.cat(finals)

    state = rows.pop("initial_state")
    parts = {"g" if name == "log_a" else name: part for name, part in rows.items()}
    y, final = fla._run(theirs, parts, documents, state)
    wanted, wanted_final = gated_delta_recurrence(**rows, documents=documents, initial_state=state.float())
    assert_close(y, wanted)
    assert_close(final, wanted_final)


def test_without_a_gpu_the_reference_runs_and_forcing_says_why():
    leaves, fixed = inputs(cases.TEST[1], torch.float32)
    assert fla.refusal("gated_delta_rule", reference_rule, cases.draw, cases.check(8, 8), leaves["v"]) is not None
    with kernels.backend("triton"), pytest.raises(ValueError, match="gated_delta_rule cannot run on its triton"):
        gated_delta_rule(**leaves, **fixed)
