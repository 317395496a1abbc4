"""Mixers that transformers has too, as judges that no one here wrote: the same weights give the same outputs.

In float32: the whole sequence, a prompt and then single tokens on a cache, and rows padded on the left.
"""

import inspect
from importlib import import_module

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache

from students.cache import MixerState
from students.mixers import make_mixer
from students.mixers.mixer import Context, Shape

SINCE = Version("5.23")  # before it, norms of several groups were one norm over all heads, and caches had no such states
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < SINCE,
    reason=f"not run: the judges are transformers {SINCE} or newer, and this is {transformers.__version__}",
)

SHAPE = Shape(d_model=32, n_heads=4, n_kv_heads=2, head_dim=8)
TIME, PROMPT, PADDING = 23, 17, 5
# Mixer and options here, then class, config class and its options in the module of that name there.
MAMBA2 = {"expand": 2, "n_groups": 2, "d_state": 6}
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 8}
JUDGES = {
    "mamba": ("mamba1", {"d_state": 5}, "MambaMixer", "MambaConfig", {"state_size": 5, "expand": 1}),
    "jamba": (
        "mamba1",
        {"d_state": 5, "norms": True},
        "JambaMambaMixer",
        "JambaConfig",
        {"mamba_d_state": 5, "mamba_expand": 1, "rms_norm_eps": SHAPE.norm_eps, "attn_layer_offset": 1},
    ),
    "mamba2": (
        "mamba2",
        MAMBA2,
        "Mamba2Mixer",
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 8},
    ),
    "bamba": ("mamba2", MAMBA2, "BambaMixer", "BambaConfig", BAMBA),
    "granitemoehybrid": (
        "mamba2",
        MAMBA2,
        "GraniteMoeHybridMambaLayer",
        "GraniteMoeHybridConfig",
        {**BAMBA, "rms_norm_eps": SHAPE.norm_eps},
    ),
    "falcon_h1": (
        "mamba2",
        MAMBA2,
        "FalconH1Mixer",
        "FalconH1Config",
        {**BAMBA, "mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "zamba2": (
        "mamba2",
        MAMBA2,
        "Zamba2MambaMixer",
        "Zamba2Config",
        {"n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 6, "chunk_size": 8, "layers_block_type": ["mamba"]},
    ),
}


def pair(name):
    """Our mixer and theirs, with the same random weights, and their config."""
    ours_name, ours_options, class_name, config_name, options = JUDGES[name]
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(transformers, config_name)(hidden_size=SHAPE.d_model, num_hidden_layers=1, **options)
    theirs = getattr(module, class_name)(config, layer_idx=0).eval()
    if name == "falcon_h1":  # set by the model around it
        theirs.register_buffer("mup_vector", module.compute_mup_vector(config))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    ours = make_mixer(ours_name, SHAPE, ours_options)
    ours.load_state_dict(dict(theirs.named_parameters()))
    return ours, theirs, config


def their_call(theirs, h, cache=None, mask=None):
    known = inspect.signature(theirs.forward).parameters
    argument = next(name for name in ("cache", "cache_params", "past_key_values") if name in known)
    out = theirs(h, **{argument: cache}, attention_mask=mask)
    return out[0] if isinstance(out, tuple) else out


def close(found, wanted):
    assert wanted.abs().max() > 1e-2
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("name", JUDGES)
@torch.no_grad()
def test_a_whole_sequence(name):
    ours, theirs, _ = pair(name)
    h = torch.randn(2, TIME, SHAPE.d_model)
    close(ours(h), their_call(theirs, h))


@pytest.mark.parametrize("name", JUDGES)
@torch.no_grad()
def test_a_prompt_and_steps(name):
    ours, theirs, config = pair(name)
    h = torch.randn(2, TIME, SHAPE.d_model)
    state, cache = MixerState(), DynamicCache(config=config)
    for start, stop in [(0, PROMPT)] + [(i, i + 1) for i in range(PROMPT, TIME)]:
        close(ours(h[:, start:stop], Context(state=state)), their_call(theirs, h[:, start:stop], cache))


@pytest.mark.parametrize("name", JUDGES)
@torch.no_grad()
def test_left_padding(name):
    ours, theirs, _ = pair(name)
    h = torch.randn(2, TIME, SHAPE.d_model)
    mask = torch.ones(2, TIME, dtype=torch.long)
    mask[0, :PADDING] = 0
    found, wanted = ours(h, Context(documents=mask - 1)), their_call(theirs, h, mask=mask)
    close(found[0, PADDING:], wanted[0, PADDING:])
    close(found[1], wanted[1])


def recurrent_gemma():
    """Our RG-LRU mixer and RecurrentGemma's block, with the same random weights."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    heads = {"num_attention_heads": SHAPE.n_heads, "lru_width": SHAPE.d_model, "conv1d_width": 4}
    config = transformers.RecurrentGemmaConfig(hidden_size=SHAPE.d_model, num_hidden_layers=1, **heads)
    theirs = RecurrentGemmaRecurrentBlock(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    ours = make_mixer("rg_lru", SHAPE, {})
    ours.load_state_dict(dict(theirs.named_parameters()))
    return ours, theirs


@torch.no_grad()
def test_recurrent_gemma_on_a_whole_sequence():
    ours, theirs = recurrent_gemma()
    h = torch.randn(2, TIME, SHAPE.d_model)
    close(ours(h), theirs(h, torch.arange(TIME).expand(2, -1), None, use_cache=False)[0])


@torch.no_grad()
def test_recurrent_gemma_on_a_prompt_and_steps():
    ours, theirs = recurrent_gemma()
    h, state = torch.randn(2, TIME, SHAPE.d_model), MixerState()
    for start, stop in [(0, PROMPT)] + [(i, i + 1) for i in range(PROMPT, TIME)]:
        positions = torch.arange(start, stop).expand(2, -1)
        wanted = theirs(h[:, start:stop], positions, None, use_cache=True)[0]
        close(ours(h[:, start:stop], Context(state=state)), wanted)


@torch.no_grad()
def test_recurrent_gemma_on_packed_documents():
    """Its recurrence starts again at every position 0. Its convolution does not, so here it only scales."""
    ours, theirs = recurrent_gemma()
    for module in (ours, theirs):
        module.conv_1d.weight[:, :, :-1] = 0
    documents = torch.zeros(2, TIME, dtype=torch.long)
    documents[0, 4:], documents[0, 5:], documents[1, 11:] = 1, 2, 1
    positions = torch.stack([torch.cat([torch.arange(n) for n in parts]) for parts in ((4, 1, TIME - 5), (11, TIME - 11))])
    h = torch.randn(2, TIME, SHAPE.d_model)
    close(ours(h, Context(documents=documents)), theirs(h, positions, None, use_cache=False)[0])
