"""The Triton kernel of attention for one token against its reference in float64, over places of a cache."""

import pytest
import torch

from distill.benchmarks.check import relative_errors
from students.kernels import attention
from students.kernels.attention import cases as attention_cases
from students.kernels.attention import decode
from students.kernels.op import forced
from tests.students.triton_checks import DEVICE, check

pytestmark = [  # the interpreter works out both sides of a mask
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


SHARES = decode.Config(16, 4, 1, 3)  # several shares of several tiles


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("case", attention_cases.TEST_PLACES, ids=str)
def test_attention_to_places(case, new):
    """The newest keys beside the places, or at theirs: the same, and afterwards they stand there."""
    leaves, fixed = attention_cases.draw_places(case, torch.float32, DEVICE)
    fixed["new"] = tuple(torch.randn(case.b, case.t, case.kv, case.d, device=DEVICE) for _ in "kv") if new else None

    def run(function, **options):
        def outputs(k, v, new, **inputs):
            k, v = k.clone(), v.clone()
            new = None if new is None else tuple(part.to(k.dtype) for part in new)
            return function(k=k, v=v, new=new, **inputs, **options), k, v

        return outputs

    found = run(decode.attend_places, config=SHARES)
    check(relative_errors(found, run(attention.reference_places), leaves, fixed))


def test_attention_to_places_in_half_precision():
    draws = attention_cases.draw_places(attention_cases.TEST_PLACES[3], torch.float16, DEVICE)
    check(relative_errors(decode.attend_places, attention.reference_places, *draws), torch.float16)


@pytest.mark.parametrize(("seen", "reserved"), [(1, 90), (30, 90), (89, 90), (90, 90)])
def test_what_is_reserved_is_not_read(seen, reserved):
    """Nor what stands before a row's start, or before the window: what is there does no harm, be it no number."""
    case = attention_cases.Places(2, 1, 4, 2, 8, reserved, text=seen)
    _, fixed = attention_cases.draw_places(case, torch.float32, DEVICE)
    for first, window in ((0, None), (seen // 2, None), (0, min(seen, 17))):
        begin = max(first, seen - (window or seen))
        held = {name: fixed[name][:, begin:seen].double() for name in ("k", "v")}
        wanted = attention.reference_attention(fixed["q"].double(), *held.values(), case.d**-0.5, None, None, 0, None, None)
        given = {name: fixed[name].clone() for name in ("k", "v")}
        for part in given.values():
            part[:, :begin], part[:, seen:] = torch.nan, torch.nan
        start = torch.full((2,), first, device=DEVICE)
        found = decode.attend_places(**fixed | given | {"start": start, "window": window}, config=SHARES)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_gives_zeros():
    _, fixed = attention_cases.draw_places(attention_cases.TEST_PLACES[6], torch.float32, DEVICE)
    fixed["mask"][0] = 0
    for run in (forced(decode.attend_places, config=SHARES), attention.reference_places):
        y = run(**fixed)
        assert not y[0].any() and y[1].isfinite().all() and y[1].any()
