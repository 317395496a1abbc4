"""What single mixers of the linear-attention kind promise beyond the contract: closed forms of their starts and decays."""

import pytest
import torch

from students.kernels.documents import random_documents
from students.mixers import make_mixer
from students.mixers.longhorn import PIECE, online_scan, online_step
from students.mixers.retention import schedule
from students.mixers.transfer import Projections
from tests.students.mixer_cases import SHAPE, TIME, attention_tensors, close, context, made
from tests.students.op_checks import assert_close, assert_same_gradients


def test_retention_is_decayed_linear_attention():
    """Right after the copy a head's matrix is q k^T / sqrt(p) times gamma^lag, and its output has unit size times a gate."""
    mixer, h, _ = made("retention", {"rope": False}, stir=False)
    tensors = attention_tensors(SHAPE)
    mixer.from_attention(Projections(**tensors))
    mixer.log_decay.copy_(schedule("retnet", 4).double())
    lag = (torch.arange(TIME)[:, None] - torch.arange(TIME)).clamp(min=0)
    y = mixer.mix(mixer.project(h, context()), context())
    for head in range(SHAPE.n_heads):
        q, k, v = (h @ tensors[part][head if part == "q" else head // 2].T for part in "qkv")
        gamma = 1 - 2.0 ** -(5 + 7 * head / 3)
        M = (q @ k.transpose(1, 2) * SHAPE.head_dim**-0.5 * gamma**lag).tril()
        close(y[:, :, head], M @ v, 1e-6)  # the schedule is kept in float32


def test_retention_schedules():
    """Equation 8 of RetNet for 8 heads; lightning's slopes as transformers' MiniMax computes them."""
    assert torch.allclose(schedule("retnet", 8).double().exp(), 1 - 2.0 ** -(5 + torch.arange(8.0).double()), atol=1e-7)
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = minimax.MiniMaxConfig(
        hidden_size=16, num_attention_heads=4, head_dim=4, num_hidden_layers=2, layer_types=["linear_attention"] * 2
    )
    rate = minimax.MiniMaxLightningAttention(config, 0).get_slope_rate()  # of layer 0, where depth softens nothing
    assert torch.allclose(schedule("lightning", 4), -rate.flatten(), rtol=1e-4)


def test_retention_refuses():
    with pytest.raises(ValueError, match="decay is 'slow'; it is one of retnet, lightning"):
        make_mixer("retention", SHAPE, {"decay": "slow"})


def test_gla_starts_as_decayed_linear_attention():
    """Right after the copy a head's matrix is q k^T / sqrt(p) times 2^(-lag / half-life), the half-lives 4 to 512 tokens."""
    mixer, h, _ = made("gla", {}, stir=False)
    tensors = attention_tensors(SHAPE)
    mixer.from_attention(Projections(**tensors))
    y = mixer.mix(mixer.project(h, context()), context())
    lag = (torch.arange(TIME)[:, None] - torch.arange(TIME)).clamp(min=0)
    for head, half_life in enumerate(torch.logspace(2, 9, 4, base=2.0, dtype=torch.float64)):
        q, k, v = (h @ tensors[part][head if part == "q" else head // 2].T for part in "qkv")
        M = (q @ k.transpose(1, 2) * SHAPE.head_dim**-0.5 * 0.5 ** (lag / half_life)).tril()
        close(y[:, :, head], M @ v, 1e-6)  # half-lives are spread in float32


def longhorn_by_definition(x, k, q, beta, documents, state):
    """Token by token: the state moves towards x along k, each number by its own share."""
    outputs = []
    for t in range(x.shape[1]):
        if t:
            state = state * (documents[:, t] == documents[:, t - 1]).to(state)[:, None, None, None]
        key = k[:, t, :, None]
        step = (beta[:, t] / (1 + beta[:, t] * k[:, t].square().sum(-1, keepdim=True)))[..., None]
        state = (1 - step * key.square()) * state + step * x[:, t, :, :, None] * key
        outputs.append((state * q[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


def longhorn_inputs(time, dtype=torch.float64):
    sizes = {"x": (2, time, 3, 4), "k": (2, time, 3, 5), "q": (2, time, 3, 5), "beta": (2, time, 3, 4)}
    inputs = {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}
    return inputs | {"beta": inputs["beta"].sigmoid()}, torch.randn(2, 3, 4, 5, dtype=dtype)


def test_longhorn_scan():
    inputs, state = longhorn_inputs(2 * PIECE + 44)
    documents = random_documents(2, 2 * PIECE + 44)
    leaves = [part.requires_grad_() for part in (*inputs.values(), state)]
    found = online_scan(**inputs, documents=documents, initial_state=state)
    wanted = longhorn_by_definition(**inputs, documents=documents, state=state)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, leaves)


def test_longhorn_step_and_bare_scan():
    inputs, _ = longhorn_inputs(9)
    wanted, last = online_scan(**inputs)
    _, state = online_scan(**{name: part[:, :8] for name, part in inputs.items()})
    y, state = online_step(**{name: part[:, 8] for name, part in inputs.items()}, state=state)
    assert_close(y, wanted[:, 8])
    assert_close(state, last)


def test_longhorn_survives_enormous_keys():
    """A key so large that all of the old is overwritten: 1 - Delta k^2 is 0 in float32, its logarithm must not be taken."""
    inputs, state = longhorn_inputs(6, torch.float32)
    inputs["k"] = torch.zeros_like(inputs["k"])
    inputs["k"][..., 0] = 1e6
    leaves = [part.requires_grad_() for part in (*inputs.values(), state)]
    y, final = online_scan(**inputs, initial_state=state)
    gradients = torch.autograd.grad(y.sum() + final.sum(), leaves)
    assert all(torch.isfinite(part).all() for part in (y, final, *gradients))


def test_longhorn_calibrates_how_long_it_remembers():
    """After calibration a channel loses, on average over these inputs, ln 2 / half-life a token."""
    mixer, h, _ = made("longhorn", {}, stir=False)
    parts = mixer.project(h, context())
    lost = (parts.beta.mean((0, 1, 3)) * parts.k.square().mean((0, 1, 3))).double()
    close(lost, torch.log(torch.tensor(2.0).double()) / torch.logspace(2, 9, 4, base=2.0).double(), 1e-2)
