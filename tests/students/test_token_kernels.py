"""The kernels of one token against plain PyTorch in float64, in Triton's interpreter."""

import copy

import pytest
import torch

from students.kernels.attention import attention
from students.kernels.ssm_token import cases as ssm_cases
from students.kernels.ssm_token.reference import ssm_token as reference_ssm
from students.kernels.token_linear import cases as linear_cases
from students.kernels.token_linear.reference import token_linear as reference_linear
from students.kernels.window_token import cases as window_cases
from students.kernels.window_token.reference import window_token as reference_window
from students.mixers.projections import qk_norm, rotate


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


@pytest.mark.parametrize("case", linear_cases.TEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_token_linear(case, dtype):
    from students.kernels.token_linear import kernel

    (x, rows), options = linear_cases.draw(case, dtype, "cpu")
    exact = {name: doubled(value) for name, value in options.items()}
    names = "norm", "residual", "swiglu"
    wanted = reference_linear(x.double(), doubled(rows), *(exact[n] for n in names), torch.float64, exact["also"])
    for config in kernel.CONFIGS[: 3 if case.b == 1 else 1]:
        given = (*(options[n] for n in names), torch.float32, options["also"])
        found = kernel.token_linear(x, rows, *given, config=config)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            near(one, other, 3e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("case", ssm_cases.TEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ssm_token(case, dtype):
    """Tokens one after the other, until every ring has turned: outputs, states and rings."""
    from students.kernels.ssm_token import kernel

    given = ssm_cases.draw(case, dtype, "cpu")
    exact = {name: doubled(value) for name, value in given.items()}
    for config in kernel.CONFIGS:
        own, other = copy.deepcopy(given), copy.deepcopy(exact)
        for at, token in enumerate(ssm_cases.tokens(case, dtype, "cpu")):
            column = torch.tensor([at + 5])
            outputs = []
            for run, inputs, where, kind in (
                (kernel.ssm_token, token, own, torch.float32),
                (reference_ssm, doubled(token), other, torch.float64),
            ):
                outputs.append(
                    run(
                        *inputs, where["conv"], where["D"], where["state"], column, kind, case.g, where["stock"],
                        where["gate"], where["lag"], None, **({"config": config} if run is kernel.ssm_token else {}),
                    )
                )  # fmt: skip
            near(*outputs, 1e-5 if dtype == torch.float32 else 5e-3)
        near(own["state"], other["state"], 1e-5 if dtype == torch.float32 else 5e-3)
        for ring, wanted in zip(own["lag"] or (), other["lag"] or (), strict=True):
            near(ring, wanted, 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("case", window_cases.TEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_window_token(case, dtype):
    """Tokens one by one, until the ring has turned and the sinks are full; the reference against plain attention."""
    from students.kernels.window_token import kernel

    keys, options = window_cases.draw(case, dtype, "cpu")
    others = doubled(keys)
    tolerance, seen = 1e-5 if dtype == torch.float32 else 5e-3, []
    for at in range(window_cases.STEPS):
        parts, rope = window_cases.token(case, at, dtype, "cpu")
        rest = [options[name] for name in ("scale", "softcap")], [options[name] for name in ("norms", "factors")]
        column = torch.tensor([at])
        found = kernel.window_token(*parts, keys, column, torch.float32, *rest[0], rope, *rest[1], None)
        wanted = reference_window(
            *doubled(parts), others, column, torch.float64, *rest[0], doubled(rope), *doubled(rest[1]), None
        )
        real = keys.offset + at >= 0  # a row whose text has not begun
        near(found[real], wanted[real], tolerance)
        seen.append((doubled(parts), doubled(rope)))
        near(wanted[0], _plain(case, seen, options)[0], 1e-6)
    near(keys.k, others.k, tolerance)
    for found, wanted in zip(keys.sinks or (), others.sinks or (), strict=True):
        near(found, wanted, tolerance)


def _plain(case, seen, options):
    """The last token's attention over the whole text of the first row, with the mixers' own pieces."""
    heads = [torch.stack([parts[i] for parts, _ in seen], 1) for i in range(3)]
    if options["norms"] is not None:
        norms = doubled(options["norms"])
        heads[:2] = [qk_norm(part, w, norms.kind, norms.eps) for part, w in zip(heads[:2], norms[:2], strict=True)]
    if case.rope is not None:
        tables = tuple(torch.cat([rope[i] for _, rope in seen], 1) for i in range(2))
        heads[:2] = [rotate(part, tables, case.rope) for part in heads[:2]]
    documents = torch.zeros(case.b, len(seen), dtype=torch.long)
    positions = torch.arange(len(seen)).expand(case.b, -1)
    where = {"window": case.window, "sinks": case.sinks, "documents": documents, "positions": positions}
    y = attention(*heads, scale=options["scale"], softcap=options["softcap"], **where)
    return y[:, -1] * options["factors"].double()[:, None]
