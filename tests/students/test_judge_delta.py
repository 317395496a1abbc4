"""Gated DeltaNet against transformers' own Qwen3-Next and Qwen3.5 layers, the same weights in both: outside judges."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache

from students.cache import MixerState
from students.mixers.gated_deltanet import GatedDeltaNet
from students.mixers.mixer import Context, Shape

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason=f"not run: transformers {transformers.__version__} is older than 5.23, whose layers these tests know",
)

SHAPE = Shape(d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, norm_eps=1e-6)
SIZES = {
    "hidden_size": 24,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
    "rms_norm_eps": 1e-6,
}


def mixer():
    torch.manual_seed(3)
    mixer = GatedDeltaNet(SHAPE)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return mixer


def qwen3_5(ours):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**SIZES)
    layer = Qwen3_5GatedDeltaNet(config, 0)
    layer.load_state_dict(ours.state_dict())  # the names are the same
    return layer, config


def qwen3_next(ours):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(**SIZES)
    layer = Qwen3NextGatedDeltaNet(config, 0)
    weights = ours.state_dict()
    q, k, v = weights.pop("in_proj_qkv.weight").unflatten(0, (3, 4, 8))
    z = weights.pop("in_proj_z.weight").unflatten(0, (4, 8))
    weights["in_proj_qkvz.weight"] = torch.cat([q, k, v, z], 1).flatten(0, 1)  # head by head
    b_and_a = [weights.pop(f"in_proj_{name}.weight") for name in "ba"]
    weights["in_proj_ba.weight"] = torch.stack(b_and_a, 1).flatten(0, 1)
    layer.load_state_dict(weights)
    return layer, config


@pytest.mark.parametrize("judge", [qwen3_next, qwen3_5])
@torch.no_grad()
def test_prefill_and_steps(judge):
    ours = mixer()
    theirs, config = judge(ours)
    h = torch.randn(2, 90, 24)
    wanted = theirs(h)
    tolerance = 1e-5 * wanted.abs().max()
    assert (ours(h) - wanted).abs().max() <= tolerance
    cache, state = DynamicCache(config=config), MixerState()
    for start, stop in ((0, 86), (86, 87), (87, 88), (88, 89), (89, 90)):
        piece = h[:, start:stop]
        found = ours(piece, Context(state=state))
        assert (found - theirs(piece, cache)).abs().max() <= tolerance
        assert (found - wanted[:, start:stop]).abs().max() <= tolerance
