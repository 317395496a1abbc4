"""Single mixers beyond the contract: half-lives, starts from attention, split heads, selected tokens, refused options."""

from dataclasses import replace

import pytest
import torch

from students.cache import MixerState
from students.mixers import MIXERS, make_mixer, mixer_class
from students.mixers.mixer import Shape
from students.mixers.projections import group_factors, lost_power
from students.mixers.starts import OPEN_GELU, OPEN_SILU
from students.mixers.transfer import Projections
from tests.students.mixer_cases import BIASED, SHAPE, TIME, WINDOW, attention_tensors, close, context, made


@pytest.mark.parametrize("name", [name for name in MIXERS if mixer_class(name).has_decay])
def test_a_state_is_halved_in_a_half_life(name):
    """Where nothing more enters, half of a head's state is left after its half-life."""
    mixer, h, _ = made(name, {}, stir=False)
    mixer.set_half_lives(torch.full((SHAPE.n_heads,), 5.0, dtype=torch.float64))
    state, held = MixerState(), []
    for piece, size in ((slice(0, 8), 1.0), (slice(8, 13), 0.0)):
        parts = mixer.project(h[:, piece], context(None, state, piece.start, piece.stop))
        still = {"values": size * parts.values}
        if hasattr(parts, "beta"):  # a delta rule with beta also takes away
            still["beta"] = size * parts.beta
        mixer.mix(replace(parts, **still), context(None, state, piece.start, piece.stop))
        state.advance(piece.stop - piece.start, None)
        heads = [terms[0] for terms in mixer.head_terms()]
        held.append(state.read("ssm").flatten(1).unflatten(1, (parts.values.shape[2], -1))[:, heads].clone())
    assert held[0].abs().amax(-1).min() > 0
    close(held[1], held[0] / 2)


@pytest.mark.parametrize("name", [name for name in MIXERS if mixer_class(name).has_decay and mixer_class(name).orientable])
def test_half_lives(name):
    """With a half-life of 5 tokens, what a head holds is halved in 5 tokens."""
    mixer, h, _ = made(name, {}, stir=False)
    mixer.set_half_lives(torch.full((SHAPE.n_heads,), 5.0, dtype=torch.float64))
    parts = mixer.project(h, context())
    log_a = mixer.semiseparable(parts).log_a if mixer.orientable else parts.log_a
    held = log_a[:, :5].sum(1).exp()
    close(held, torch.full_like(held, 0.5), 1e-6)


def test_attention_mixer_is_attention():
    """The full attention mixer computes softmax(q k) v from the tensors it was given, key heads shared in blocks."""
    mixer, h, _ = made("attention", {"rope": False}, stir=False)
    tensors = attention_tensors(SHAPE)
    mixer.from_attention(Projections(**tensors))
    q = torch.einsum("btd,hpd->bhtp", h, tensors["q"])
    k, v = (torch.einsum("btd,kpd->bktp", h, tensors[part]) for part in "kv")
    heads = []
    for head in range(SHAPE.n_heads):
        shared = head // (SHAPE.n_heads // SHAPE.n_kv_heads)
        logits = q[:, head] @ k[:, shared].transpose(1, 2) * SHAPE.head_dim**-0.5
        mask = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
        heads.append(logits.masked_fill(mask, -torch.inf).softmax(-1) @ v[:, shared])
    close(mixer(h, context()), sum(torch.einsum("btp,dp->btd", a, o) for a, o in zip(heads, tensors["o"], strict=True)))


def test_discrete_mamba2_starts_as_decayed_linear_attention():
    """Right after the copy, a head's matrix is q k^T / sqrt(p) times its decay: the mapping C<-Q, B<-K, x<-V, out<-O."""
    mixer, h, _ = made("discrete_mamba2", {}, stir=False)
    tensors = attention_tensors(SHAPE)
    mixer.from_attention(Projections(**tensors))
    out = 0.0
    for head in range(SHAPE.n_heads):
        q, k, v = (h @ tensors[part][head if part == "q" else head // 2].T for part in "qkv")
        lag = (torch.arange(TIME)[:, None] - torch.arange(TIME)).clamp(min=0)
        half_life = torch.nn.functional.softplus(mixer.a_proj.bias[head])
        M = (q @ k.transpose(1, 2) * SHAPE.head_dim**-0.5 * torch.exp(-half_life * lag)).tril()
        out = out + M @ v @ tensors["o"][head].T
    close(mixer(h, context()), out, 1e-8)


@pytest.mark.parametrize(("groups", "width"), [(1, 5), (1, 16), (2, 8), (2, 3), (4, 8)])
def test_a_group_takes_what_is_nearest_to_its_heads_logits(groups, width):
    """C^T B is the best of its rank for the mean of the heads' q^T k; what it loses of their power is in the record."""
    q, k = torch.randn(4, 8, 24, dtype=torch.float64), torch.randn(2, 8, 24, dtype=torch.float64).repeat_interleave(2, 0)
    logits = q.transpose(1, 2) @ k
    C, B = group_factors(q, k, groups, width, 2)
    assert C.shape == B.shape == (groups, width, 24)
    u, s, vh = torch.linalg.svd(logits.unflatten(0, (groups, -1)).mean(1))
    best = (u[..., :width] * s[:, None, :width]) @ vh[:, :width]
    close(C.transpose(1, 2) @ B, best)
    left = logits - best.repeat_interleave(4 // groups, 0)
    assert lost_power(q, k, C, B) == pytest.approx((left.square().sum() / logits.square().sum()).item(), abs=1e-12)
    record = made("mamba2", {"n_groups": groups, "d_state": width})[2].sources["in_proj.weight"]
    assert ("of the logits' power lost" in record) == (groups < 4)


def test_open_gates_are_open():
    silu, gelu = (torch.tensor(value, dtype=torch.float64) for value in (OPEN_SILU, OPEN_GELU))
    assert torch.nn.functional.silu(silu).item() == pytest.approx(1, abs=1e-9)
    assert torch.nn.functional.gelu(gelu, approximate="tanh").item() == pytest.approx(1, abs=1e-9)


def test_stock_mamba2_starts_nearly_linear():
    """The gate is constant on real inputs and the norm divides by almost a constant: doubling the values doubles the output
    far more nearly than without companions."""
    errors = []
    for expand in (2, 1):
        mixer, _, transfer = made("mamba2", {"expand": expand}, stir=False)
        h = torch.randn(2, TIME, SHAPE.d_model, dtype=torch.float64) + 3.0
        mixer.calibrate(h, transfer)
        parts = mixer.project(h, context())
        y = mixer.mix(parts, context())
        louder = y.clone()
        louder[:, :, ::expand] *= 2
        once, twice = (mixer.features(part, h)[:, :, ::expand] for part in (y, louder))
        errors.append(((twice - 2 * once).norm() / (2 * once).norm()).item())
    assert errors[0] < 0.2 < errors[1]


@pytest.mark.parametrize("kept", [[2], [3, 0], [0, 1, 2]])
def test_kept_heads_are_attention(kept):
    """Kept heads give what the same heads of full attention give, in any grouping of the key heads that they read."""
    mixer, h, _ = made("split_heads", {"keep": kept}, stir=False)
    whole = make_mixer("attention", SHAPE, {}).double()
    tensors = attention_tensors(SHAPE)
    mixer.from_attention(Projections(**tensors))
    whole.from_attention(Projections(**tensors))
    found = mixer.mix(mixer.project(h, context()), context())
    wanted = whole.mix(whole.project(h, context()), context())
    terms = mixer.head_terms()
    close(found[:, :, [terms[head][0] for head in kept]], wanted[:, :, kept])
    weights, all_weights = mixer.out_weight()[0], whole.out_weight()[0]
    assert all(torch.equal(weights[terms[head][0]], all_weights[head]) for head in range(SHAPE.n_heads))
    assert mixer.attention.k_proj.out_features == SHAPE.head_dim * len({head // 2 for head in kept})


def test_other_heads_are_the_ssm():
    """Head for head, the rest is what the SSM mixer makes of the whole attention."""
    mixer, h, _ = made("split_heads", {"keep": [1]}, stir=False)
    whole, tensors = make_mixer("discrete_mamba2", SHAPE, {}).double(), attention_tensors(SHAPE)
    mixer.from_attention(Projections(**tensors))
    whole.from_attention(Projections(**tensors))
    half_lives = torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    mixer.set_half_lives(half_lives)
    whole.set_half_lives(half_lives)
    found = mixer.mix(mixer.project(h, context()), context())
    wanted = whole.mix(whole.project(h, context()), context())
    close(found[:, :, 1:], wanted[:, :, [0, 2, 3]])
    assert mixer.head_terms() == [[1], [0], [2], [3]] and mixer.oriented() == [0, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": [4]}, "keep names 4; the heads here are 0 to 3"),
        ({"keep": [True]}, "keep names True"),
        ({"keep": [1, 1]}, "names a head twice"),
        ({"keep": [0, 1, 2, 3]}, "keep names all 4 heads"),
        ({"keep": 2}, "keep is 2, which is no list"),
        ({"keep": [1], "ssm": "mamba2"}, "ssm is 'mamba2', which is no dict"),
        ({"ssm": {"d_state": 4}}, "ssm names the mixer None"),
        ({"ssm": {"mixer": "attention"}}, "ssm names the mixer 'attention'"),
        ({"ssm": {"mixer": "mamba2", "d_stat": 4}}, r"\(ssm of split_heads\) has no option 'd_stat'"),
    ],
)
def test_heads_that_cannot_be_split(options, message):
    with pytest.raises(ValueError, match=message):
        make_mixer("split_heads", SHAPE, options)


def test_selected_tokens_alone_use_the_window():
    """Taipan's gate: a token that it does not select gets its output from the state, one that it does also the window's."""
    window = {**WINDOW, "lag": False, "gate": "select"}
    mixer, h, _ = made("discrete_mamba2", {"window": window}, stir=False)
    both = mixer(h, context())
    with torch.no_grad():
        mixer.select.weight.zero_()
        mixer.select.weight[0, 0], mixer.select.bias[0] = 100.0, 0.0
    selected = h[..., 0] > 0
    assert selected.any() and not selected.all()
    state = mixer.ssm(h, context())
    found = mixer(h, context())
    assert torch.equal(found[~selected], state[~selected])
    assert (found - state)[selected].abs().amax(-1).min() > 1e-6
    close(both - state, mixer.window(h, context()) * torch.tanh(torch.tensor(1.0, dtype=torch.float64)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="gate of a window is 'selct'"):
        make_mixer("mamba2", SHAPE, {"window": {"size": 4, "gate": "selct"}})
    with pytest.raises(ValueError, match="there is no mixer 'mamba3'"):
        make_mixer("mamba3", SHAPE, {})
    with pytest.raises(ValueError, match="no option 'd_stat'"):
        make_mixer("mamba2", SHAPE, {"d_stat": 4})
    with pytest.raises(ValueError, match="has no size"):
        make_mixer("mamba2", SHAPE, {"window": {"sinks": 4}})
    with pytest.raises(ValueError, match="unknown 'sink'"):
        make_mixer("mamba2", SHAPE, {"window": {"size": 4, "sink": 4}})
    with pytest.raises(ValueError, match="size must be at least 1"):
        make_mixer("mamba2", SHAPE, {"window": {"size": 0}})
    with pytest.raises(ValueError, match="expand must be 1 or 2"):
        make_mixer("mamba2", SHAPE, {"expand": 3})
    with pytest.raises(ValueError, match="4 heads cannot share 3 key heads"):
        Shape(8, 4, 3, 2)
    with pytest.raises(ValueError, match="rg_lru has no lag: its state takes every token at once"):
        make_mixer("rg_lru", SHAPE, {"window": {"size": 4, "lag": True}})
    with pytest.raises(ValueError, match="mamba1 has no q, k and v projections for its window to borrow"):
        make_mixer("mamba1", SHAPE, {"window": {"size": 4, "own": False}})
    with pytest.raises(ValueError, match="d_state must be at least 2"):
        make_mixer("mamba1", SHAPE, {"d_state": 1})
    with pytest.raises(ValueError, match="n_groups 3 does not divide the 4 attention heads"):
        make_mixer("mamba1", SHAPE, {"n_groups": 3})
    with pytest.raises(ValueError, match="step takes one token"):
        mixer, h, _ = made("mamba2", {})
        mixer.step(h, context())


def test_a_silenced_branch_takes_no_bias_with_it():
    both = {"keep": [1], "ssm": {"mixer": "discrete_mamba2", "window": {**WINDOW, "gate": True}}}
    for name, options in (("split_heads", both), ("parallel_heads", {}), ("discrete_mamba2", {"window": WINDOW})):
        mixer, h, _ = made(name, options, BIASED)
        mixer.silence(mixer.branch_terms())
        bias = mixer.out_weight()[1]
        torch.testing.assert_close(mixer(h, context()), bias.expand_as(mixer(h, context())))
    assert set(make_mixer("split_heads", SHAPE, options={"keep": [0]}).branch_terms()) == {"attention", "ssm"}
    with pytest.raises(ValueError, match="Windowed has no branch 'attention'; there are ssm, window"):
        mixer.silence(["attention"])
