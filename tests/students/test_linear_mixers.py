"""What single mixers of the linear-attention kind promise beyond the contract: closed forms of their starts and decays."""

import pytest
import torch

from students.mixers import make_mixer
from students.mixers.retention import schedule
from tests.students.test_mixers import SHAPE, TIME, attention_tensors, close, context, made


def test_retention_is_decayed_linear_attention():
    """Right after the copy a head's matrix is q k^T / sqrt(p) times gamma^lag, and its output has unit size times a gate."""
    mixer, h, _ = made("retention", {"rope": False}, stir=False)
    tensors = attention_tensors(SHAPE)
    mixer.from_attention(**tensors)
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
    mixer.from_attention(**tensors)
    y = mixer.mix(mixer.project(h, context()), context())
    lag = (torch.arange(TIME)[:, None] - torch.arange(TIME)).clamp(min=0)
    for head, half_life in enumerate(torch.logspace(2, 9, 4, base=2.0, dtype=torch.float64)):
        q, k, v = (h @ tensors[part][head if part == "q" else head // 2].T for part in "qkv")
        M = (q @ k.transpose(1, 2) * SHAPE.head_dim**-0.5 * 0.5 ** (lag / half_life)).tril()
        close(y[:, :, head], M @ v, 1e-6)  # half-lives are spread in float32
