"""The kernels of one token against plain PyTorch in float64: here in Triton's interpreter, on a GPU in `tests/gpu`."""

import copy

import pytest
import torch

from students.kernels.attention import attention
from students.kernels.delta_token import cases as delta_cases
from students.kernels.delta_token.reference import delta_token as reference_delta
from students.kernels.heads import qk_norm
from students.kernels.lru_token import cases as lru_cases
from students.kernels.rotary_token import cases as rotary_cases
from students.kernels.rotary_token.reference import rotary_token as reference_rotary
from students.kernels.selective_token import cases as selective_cases
from students.kernels.ssm_token import cases as ssm_cases
from students.kernels.ssm_token.reference import ssm_token as reference_ssm
from students.kernels.token_linear import cases as linear_cases
from students.kernels.token_linear.reference import token_linear as reference_linear
from students.kernels.window_token import cases as window_cases
from students.kernels.window_token.reference import window_token as reference_window
from students.mixers.projections import rotate

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
every_type = pytest.mark.parametrize("dtype", TOLERANCE)


def doubled(value):
    """The same in float64, tuples and lists gone through."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(doubled(part) for part in value))
    return type(value)(doubled(part) for part in value) if isinstance(value, tuple | list) else value


def near(found, wanted, tolerance):
    assert found.isfinite().all()
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    assert error < tolerance, f"{error:.1e}"


def check_linear(case, dtype, device, tolerance, configs):
    from students.kernels.token_linear import kernel

    (x, rows), options = linear_cases.draw(case, dtype, device)
    exact, names = {name: doubled(value) for name, value in options.items()}, ("norm", "residual", "swiglu")
    wanted = reference_linear(x.double(), doubled(rows), *(exact[n] for n in names), torch.float64, exact["also"])
    for config in configs if case.b == 1 else [None]:
        given = (*(options[n] for n in names), torch.float32, options["also"])
        found = kernel.token_linear(x, rows, *given, config=config)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            near(one, other, tolerance)


def check_ssm(case, dtype, device, tolerance, configs):
    """Tokens one after the other, until every ring has turned: outputs, states and rings."""
    from students.kernels.ssm_token import kernel

    given = ssm_cases.draw(case, dtype, device)
    exact = {name: doubled(value) for name, value in given.items()}
    for config in configs:
        own, other = copy.deepcopy(given), copy.deepcopy(exact)
        for at, token in enumerate(ssm_cases.tokens(case, dtype, device)):
            outputs, column = [], torch.tensor([at + 5], device=device)
            for run, inputs, where, kind in (
                (kernel.ssm_token, token, own, torch.float32),
                (reference_ssm, doubled(token), other, torch.float64),
            ):
                kept = [where[name] for name in ("conv", "D", "state")]
                options = [where[name] for name in ("stock", "gate", "lag")]
                more = {"config": config} if run is kernel.ssm_token else {}
                outputs.append(run(*inputs, *kept, column, kind, case.g, *options, None, **more))
            near(*outputs, tolerance)
        near(own["state"], other["state"], tolerance)
        for ring, wanted in zip(own["lag"] or (), other["lag"] or (), strict=True):
            near(ring, wanted, tolerance)


def check_delta(case, dtype, device, tolerance, configs):
    """Tokens one after the other, until the ring has turned."""
    from students.kernels.delta_token import kernel

    given = delta_cases.draw(case, dtype, device)
    exact = {name: doubled(value) for name, value in given.items()}
    for config in configs:
        own, other = copy.deepcopy(given), copy.deepcopy(exact)
        for at in range(delta_cases.STEPS):
            token, column = delta_cases.token(case, device), torch.tensor([at + 5], device=device)
            found = kernel.delta_token(**token, **own, column=column, dtype=torch.float32, config=config)
            token = {name: part.double() for name, part in token.items()}
            near(found, reference_delta(**token, **other, column=column, dtype=torch.float64), tolerance)
        near(own["state"], other["state"], tolerance)


def check_window(case, dtype, device, tolerance):
    """Tokens one by one, until the ring has turned and the sinks are full; the reference against plain attention."""
    from students.kernels.window_token import kernel

    keys, options = window_cases.draw(case, dtype, device)
    others, seen = doubled(keys), []
    before, behind = ([options[name] for name in names] for names in (("scale", "softcap"), ("norms", "factors")))
    for at in range(window_cases.STEPS):
        parts, rope = window_cases.token(case, at, dtype, device)
        column = torch.tensor([at], device=device)
        found = kernel.window_token(*parts, keys, column, torch.float32, *before, rope, *behind, None, options["share"])
        exact = doubled(rope), *doubled(behind), None, doubled(options["share"])
        wanted = reference_window(*doubled(parts), others, column, torch.float64, *before, *exact)
        real = keys.offset + at >= 0  # a row whose text has not begun
        near(found[real], wanted[real], tolerance)
        seen.append((doubled(parts), doubled(rope)))
        near(wanted[0], _plain(case, seen, options, device)[0], 1e-6)
    near(keys.k, others.k, tolerance)
    for found, wanted in zip(keys.sinks or (), others.sinks or (), strict=True):
        near(found, wanted, tolerance)


def _plain(case, seen, options, device):
    """The last token's attention over the whole text of the first row, with the mixers' own pieces."""
    heads = [torch.stack([parts[i] for parts, _ in seen], 1) for i in range(3)]
    if options["norms"] is not None:
        norms = doubled(options["norms"])
        heads[:2] = [qk_norm(part, w, norms.kind, norms.eps) for part, w in zip(heads[:2], norms[:2], strict=True)]
    if case.rope is not None:
        tables = tuple(torch.cat([rope[i] for _, rope in seen], 1) for i in range(2))
        heads[:2] = [rotate(part, tables, case.rope) for part in heads[:2]]
    documents = torch.zeros(case.b, len(seen), dtype=torch.long, device=device)
    positions = torch.arange(len(seen), device=device).expand(case.b, -1)
    where = {"window": case.window, "sinks": case.sinks, "documents": documents, "positions": positions}
    y = attention(*heads, scale=options["scale"], softcap=options["softcap"], **where)
    y = y[:, -1] * options["factors"].double()[:, None]
    return y if options["share"] is None else y * (2 - 2 * options["share"].double().sigmoid())[..., None]


def check_rotary(case, dtype, device, tolerance):
    from students.kernels.rotary_token import kernel

    given = rotary_cases.draw(case, dtype, device)
    exact = {name: doubled(value) for name, value in copy.deepcopy(given).items()}
    near(kernel.rotary_token(**given), reference_rotary(**exact), tolerance)
    for found, wanted in zip(given["places"][:2], exact["places"][:2], strict=True):
        near(found, wanted, tolerance)


def check_op(op, case, dtype, device, tolerance):
    """A few tokens of the same inputs, the state going on: an op of which nothing but the state is changed."""
    _, given = op.draw(case, dtype, device)
    exact = {name: doubled(value) for name, value in copy.deepcopy(given).items()}
    for _ in range(3):
        found = op.adapted(op.kernel())(**given)
        exact |= {"dtype": torch.float64} if "dtype" in exact else {}
        near(found, op.adapted(op.reference)(**exact), tolerance)
        near(given["state"], exact["state"], tolerance)


@every_type
@pytest.mark.parametrize("case", linear_cases.TEST)
def test_token_linear(case, dtype):
    from students.kernels.token_linear import kernel

    check_linear(case, dtype, "cpu", TOLERANCE[dtype], kernel.CONFIGS[:1])


@every_type
@pytest.mark.parametrize("case", ssm_cases.TEST)
def test_ssm_token(case, dtype):
    from students.kernels.ssm_token import kernel

    check_ssm(case, dtype, "cpu", TOLERANCE[dtype], [kernel.CONFIGS[-1] if case.b > 1 else kernel.CONFIGS[0]])


@every_type
@pytest.mark.parametrize("case", delta_cases.TEST)
def test_delta_token(case, dtype):
    check_delta(case, dtype, "cpu", TOLERANCE[dtype], [None])


@every_type
@pytest.mark.parametrize("case", selective_cases.TEST)
def test_selective_token(case, dtype):
    check_op(selective_cases.OPS["selective_token"], case, dtype, "cpu", TOLERANCE[dtype])


@every_type
@pytest.mark.parametrize("case", lru_cases.TEST)
def test_lru_token(case, dtype):
    check_op(lru_cases.OPS["lru_token"], case, dtype, "cpu", TOLERANCE[dtype])


@every_type
@pytest.mark.parametrize("case", window_cases.TEST)
def test_window_token(case, dtype):
    check_window(case, dtype, "cpu", TOLERANCE[dtype])


@every_type
@pytest.mark.parametrize("case", rotary_cases.TEST)
def test_rotary_token(case, dtype):
    check_rotary(case, dtype, "cpu", TOLERANCE[dtype])
