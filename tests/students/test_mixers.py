"""The contract of DESIGN over every mixer of the table, alone and (for SSMs) with every kind of window branch."""

import itertools
from dataclasses import replace

import pytest
import torch

from students.cache import MixerState
from students.mixers import MIXERS, has_own_window, make_mixer, mixer_class, mixer_options
from students.mixers.mixer import Context, Mixer, Shape
from students.mixers.projections import group_factors, lost_power
from students.mixers.starts import OPEN_GELU, OPEN_SILU
from students.mixers.transfer import Projections
from tests.conftest import TOLERANCE

SHAPE = Shape(d_model=24, n_heads=4, n_kv_heads=2, head_dim=8)
BIASED = replace(SHAPE, qkv_bias=True, o_bias=True)
TIME = 70
WINDOW = {"size": 7, "sinks": 2}

# Every mixer of the table appears as it is, and every SSM with a window; here is what to try beyond that.
FURTHER = {
    "attention": [{"window": 7, "sinks": 2}, {"window": 5}, {"rope": False}],
    "discrete_mamba2": [{"rope": True, "norm": True}, {"d_state": 4}, {"d_state": 16, "d_conv": 2}, {"lag": 3}],
    "mamba1": [{"n_groups": 2, "d_state": 5, "dt_rank": 3}, {"n_groups": 4, "d_state": 12, "d_conv": 3}, {"norms": True}],
    "mamba2": [{"expand": 1}, {"n_groups": 2}, {"n_groups": 1, "d_state": 4}, {"lag": 3}],
    "rg_lru": [{"d_conv": 2}],
    "gated_deltanet": [{"d_conv": 2}],
    "gla": [{"gate_rank": 20}],
    "longhorn": [{"d_state": 4, "beta_rank": 20}, {"d_conv": 2}],
    "retention": [{"decay": "lightning"}, {"rope": False}],
    "shared_attention": [{"rank": 0}, {"rank": 3, "start": "central", "window": 7, "sinks": 2}],
    "split_heads": [
        {"keep": [0, 3]},
        {"keep": [1, 2, 0], "window": 7, "sinks": 2},
        {"keep": [2, 3], "ssm": {"mixer": "mamba2"}},
        {"keep": [1], "ssm": {"mixer": "discrete_mamba2", "window": {**WINDOW, "gate": True}}},
    ],
    "parallel_heads": [
        {"window": 7, "sinks": 2, "ssm": {"mixer": "discrete_mamba2", "d_state": 4, "norm": True}},
        {"window": 6, "ssm": {"mixer": "discrete_mamba2", "lag": 6, "rope": True}, "norm": False},
        {"ssm": {"mixer": "mamba2", "expand": 1}},
        {"window": 7, "sinks": 2, "ssm": {"mixer": "mamba2", "n_groups": 1, "d_state": 4}},
    ],
}
WINDOWS = [{**WINDOW, "own": own, "lag": lag, "gate": gate} for own, lag, gate in itertools.product((True, False), repeat=3)]
WINDOWS += [{**WINDOW, "own": True, "lag": False, "gate": "select"}]
VARIANTS = [(name, {}) for name in MIXERS]
VARIANTS += [(name, options) for name, further in FURTHER.items() for options in further]
VARIANTS += [
    (name, {"window": window})
    for name in MIXERS
    if not has_own_window(name)
    for window in WINDOWS
    if (window["own"] or mixer_class(name).lends) and (not window["lag"] or "lag" in mixer_options(name))
]
# Every mixer as it is, and of its options a sample (all with -m matrix).
every_mixer = pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, options, marks=[pytest.mark.matrix] if options else []) for name, options in VARIANTS],
    ids=lambda value: str(value).replace("'", ""),
)


def attention_tensors(shape, dtype=torch.float64):
    h, kv, p, d = shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.d_model
    sizes = {"q": (h, p, d), "k": (kv, p, d), "v": (kv, p, d), "o": (h, d, p)}
    tensors = {name: torch.randn(*size, dtype=dtype) * 0.3 for name, size in sizes.items()}
    if shape.qkv_bias:
        tensors |= {f"{name}_bias": torch.randn(*sizes[name][:2], dtype=dtype) for name in "qkv"}
    if shape.o_bias:
        tensors["o_bias"] = torch.randn(d, dtype=dtype)
    return tensors


def made(name, options, shape=SHAPE, dtype=torch.float64, stir=True):
    """A mixer made from random attention, calibrated, and stirred so that nothing stays at a special value."""
    mixer = make_mixer(name, shape, options).to(dtype)
    transfer = mixer.from_attention(Projections(**attention_tensors(shape, dtype)))
    h = torch.randn(2, TIME, shape.d_model, dtype=dtype)
    mixer.calibrate(h, transfer)
    if stir:
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
    return mixer, h, transfer


def rope_tables(time, width=SHAPE.head_dim, dtype=torch.float64, batch=2):
    angles = torch.arange(time, dtype=dtype)[:, None] / 100.0 ** (torch.arange(0, width, 2, dtype=dtype) / width)
    angles = torch.cat([angles, angles], -1).expand(batch, -1, -1)
    return angles.cos(), angles.sin()


def packed():
    documents = torch.zeros(2, TIME, dtype=torch.long)
    documents[0, 30:], documents[0, 33:], documents[1, 55:] = 1, 2, 1
    return documents


def left_padded():
    documents = torch.zeros(2, TIME, dtype=torch.long)
    documents[0, :11] = -1
    return documents


def context(documents=None, state=None, start=0, stop=TIME):
    tables = tuple(table[:, start:stop] for table in rope_tables(TIME))
    return Context(None if documents is None else documents[:, start:stop], tables, state)


def close(a, b, tolerance=TOLERANCE[torch.float64]):
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1.0)


@pytest.mark.matrix
@every_mixer
@pytest.mark.parametrize("documents", [None, packed(), left_padded()], ids=["whole", "packed", "left-padded"])
def test_chunks_and_steps_equal_forward(name, options, documents):
    mixer, h, _ = made(name, options)
    whole = mixer(h, context(documents))
    for cuts in ([0, 40, TIME], [*range(16), 37, 38, 39, 65, *range(66, TIME + 1)]):
        state, outputs = MixerState(), []
        for start, stop in itertools.pairwise(cuts):
            call = mixer.step if stop - start == 1 else mixer
            outputs.append(call(h[:, start:stop], context(documents, state, start, stop)))
        assert state.get_seq_length() == TIME
        close(torch.cat(outputs, 1), whole)


@every_mixer
def test_mix_is_its_matrix_and_causal(name, options):
    mixer, h, _ = made(name, options)
    parts = mixer.project(h, context(packed()))
    matrix = mixer.matrix(parts)
    if mixer.per_channel:
        check_channels(mixer, parts, matrix)
    else:
        close(torch.einsum("bkts,bskp->btkp", matrix, parts.values), mixer.mix(parts, context(packed())))
    assert matrix.triu(1).abs().max() == 0
    between = packed()[:, :, None] != packed()[:, None]
    assert matrix.masked_select(between[:, None]).abs().max() == 0


def check_channels(mixer, parts, matrix):
    """`mix` is linear and keeps channels apart; `matrix` is the mean over a term's channels of what each does alone."""

    def mix(values):
        return mixer.mix(replace(parts, values=values), context(packed()))

    one, two = torch.randn_like(parts.values), torch.randn_like(parts.values)
    close(mix(2 * one - 3 * two), 2 * mix(one) - 3 * mix(two))
    assert matrix.shape == (2, parts.values.shape[2], TIME, TIME)
    for column in (0, 32, 54):
        responses = []
        for channel in range(parts.values.shape[3]):
            impulse = torch.zeros_like(parts.values)
            impulse[:, column, :, channel] = 1
            y = mix(impulse)
            responses.append(y[..., channel].clone())
            y[..., channel] = 0
            assert not y.any() and not responses[-1][:, :column].any()
        close(torch.stack(responses).mean(0).transpose(1, 2), matrix[..., column])


@every_mixer
def test_forward_is_causal(name, options):
    mixer, h, _ = made(name, options)
    changed = h.clone()
    changed[:, 50] += 1.0
    difference = (mixer(h, context()) - mixer(changed, context())).abs().amax((0, 2))
    assert difference[:50].max() < 1e-12 and difference[50] > 1e-6


@every_mixer
def test_documents_do_not_leak(name, options):
    """A packed document's output is what it is alone; padding on the left changes nothing."""
    mixer, h, _ = made(name, options)
    whole = mixer(h, context(packed()))
    tables = rope_tables(TIME)
    alone = mixer(h[:1, 33:], Context(None, tuple(table[:1, 33:] for table in tables)))
    close(whole[:1, 33:], alone)
    padded = mixer(h, context(left_padded()))
    alone = mixer(h[:1, 11:], Context(None, tuple(table[:1, 11:] for table in tables)))
    close(padded[:1, 11:], alone)


@every_mixer
def test_output_is_the_sum_of_its_terms(name, options):
    mixer, h, _ = made(name, options)
    out = mixer(h, context())
    features = mixer.features(mixer.mix(mixer.project(h, context()), context()), h)
    weight, bias = mixer.out_weight()
    terms = torch.einsum("btkp,kdp->btkd", features, weight)
    close(terms.sum(2) + (0 if bias is None else bias), out)
    factors = torch.rand(terms.shape[2], dtype=torch.float64) + 0.5
    mixer.rescale(factors)
    close(mixer(h, context()), (terms * factors[:, None]).sum(2) + (0 if bias is None else bias))
    heads = mixer.head_terms()
    assert len(heads) == SHAPE.n_heads and len({term for head in heads for term in head}) == sum(map(len, heads))


@every_mixer
@pytest.mark.parametrize("shape", [SHAPE, BIASED], ids=["plain", "biased"])
def test_from_attention_accounts_for_everything(name, options, shape):
    if shape.qkv_bias and isinstance(options.get("window"), dict) and not options["window"]["own"]:
        with pytest.raises(ValueError, match="cannot have the biases of q and k"):
            made(name, options, shape)
        return
    mixer, _, transfer = made(name, options, shape)
    tensors = {key for key, _ in mixer.named_parameters()} | {key for key, _ in mixer.named_buffers()}
    assert {key for key in transfer.sources if not key.startswith("(")} == tensors  # in brackets: what is no tensor
    assert transfer.used == set(attention_tensors(shape)) - mixer.ignores
    assert set(mixer.roles()) == {key for key, _ in mixer.named_parameters()}
    assert set(mixer.roles().values()) <= {"new", "ssm", "window"}
    assert all(torch.isfinite(tensor).all() for tensor in mixer.state_dict().values())


@every_mixer
def test_an_attention_that_normalises_q_and_k(name, options):
    """Its norms' weights are taken over, and their sizes matched on inputs, by mixers that rotate q and k too."""
    if isinstance(options.get("window"), dict) and not options["window"]["own"]:
        return  # refused
    shape = replace(SHAPE, qk_norm="rms")
    norms = {f"{part}_norm": torch.rand(heads, shape.head_dim).double() + 0.5 for part, heads in (("q", 4), ("k", 2))}
    attention = Projections(**attention_tensors(shape), **norms)
    mixer, h = make_mixer(name, shape, options).double(), torch.randn(2, TIME, shape.d_model).double()
    transfer = mixer.from_attention(attention)
    q, k = (torch.randn(2, TIME, heads, shape.head_dim).double() for heads in (4, 2))
    mixer.match_norms(h, q, k, transfer)
    assert transfer.used == set(attention.__dict__) - mixer.ignores - {"q_bias", "k_bias", "v_bias", "o_bias"}
    assert all(torch.isfinite(tensor).all() for tensor in mixer.state_dict().values())


@every_mixer
def test_what_a_class_says_of_its_parameters(name, options):
    """Copied parameters and those kept in float32 are given by names that its mixers have."""
    normed = replace(BIASED, qk_norm="rms") if not isinstance(options.get("window"), dict) else SHAPE
    mixer = make_mixer(name, normed, options)
    for part in (part for part in mixer.modules() if isinstance(part, Mixer)):
        names = {key for key, _ in part.named_parameters()} | {key for key, _ in part.named_buffers()}
        assert part.float32 <= {piece for key in names for piece in key.split(".")}
        missing = {start for start in part.copied if not any(key.startswith(start) for key in names)}
        assert not missing or getattr(part, "borrowed", False) or normed.qk_norm is None


@pytest.mark.parametrize("name", MIXERS)
def test_what_a_class_says_of_its_options(name):
    kind, options = mixer_class(name), mixer_options(name)
    assert kind.layer_options | kind.zero_options <= options and not kind.hidden_options & options
    for option in options - kind.zero_options:
        with pytest.raises(ValueError):
            make_mixer(name, SHAPE, {option: 0})
    for option in kind.zero_options:
        make_mixer(name, SHAPE, {option: 0})


@every_mixer
@pytest.mark.parametrize("shape", [SHAPE, BIASED], ids=["plain", "biased"])
def test_gradients_reach_every_parameter(name, options, shape):
    if shape.qkv_bias and isinstance(options.get("window"), dict) and not options["window"]["own"]:
        return  # refused, see below
    mixer, h, _ = made(name, options, shape)
    mixer(h, context()).square().sum().backward()
    silent = [key for key, parameter in mixer.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not silent


@every_mixer
def test_float64_gradients(name, options):
    """The gradient along a random direction of all parameters and the input, against finite differences."""
    mixer, h, _ = made(name, options)
    h = h[:, :20].clone().requires_grad_()
    tables = tuple(table[:, :20] for table in rope_tables(TIME))
    tensors = [h, *mixer.parameters()]
    directions = [torch.randn_like(tensor) for tensor in tensors]

    def loss():
        return mixer(h, Context(packed()[:, 20:40], tables)).square().sum()

    gradients = torch.autograd.grad(loss(), tensors)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    values, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor += sign * step * direction
            values.append(loss())
    assert torch.isclose(slope, (values[0] - values[1]) / (2 * step), rtol=1e-5)


@every_mixer
def test_state_dict_round_trip(name, options):
    mixer, h, _ = made(name, options)
    other = make_mixer(name, SHAPE, options).to(torch.float64)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(h, context()), other(h, context()))


@every_mixer
def test_bfloat16_autocast(name, options):
    mixer, h, _ = made(name, options, dtype=torch.float32, stir=False)
    tables = rope_tables(TIME, dtype=torch.float32)
    exact = mixer(h, Context(packed(), tables))
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(h, Context(packed(), tables)).float()
    assert (rough - exact).norm() <= TOLERANCE[torch.bfloat16] * exact.norm()


@every_mixer
def test_batch_reorder(name, options):
    """Beam search swaps rows between steps; every tensor of the state must follow."""
    mixer, h, _ = made(name, options)
    state = MixerState()
    mixer(h[:, :40], context(left_padded(), state, 0, 40))
    state.reorder_cache(torch.tensor([1, 1, 0]))
    swapped = h[[1, 1, 0]]
    tables = tuple(table[[1, 1, 0], 40:] for table in rope_tables(TIME))
    out = mixer(swapped[:, 40:], Context(left_padded()[[1, 1, 0], 40:], tables, state))
    close(out, mixer(h, context(left_padded()))[[1, 1, 0], 40:])


@every_mixer
def test_orientation_matrix(name, options):
    """`semiseparable` gives the matrix that `mix` has, at the lags that this branch covers."""
    mixer, h, _ = made(name, options)
    if not mixer.orientable:
        with pytest.raises(NotImplementedError):
            mixer.semiseparable(mixer.project(h, context()))
        return
    parts = mixer.project(h, context())
    pieces = mixer.semiseparable(parts)
    total = pieces.log_a.cumsum(1).transpose(1, 2)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    M = decay * torch.einsum("bthn,bshn->bhts", pieces.C, pieces.B)
    if mixer.min_lag == 0 and pieces.D is not None:
        M = M + torch.diag_embed(pieces.D[:, None].expand(-1, TIME))
    heads = mixer.head_terms()
    wanted = mixer.matrix(parts)[:, [heads[head][0] for head in mixer.oriented()]]
    lag = torch.arange(TIME)[:, None] - torch.arange(TIME)
    far = lag >= mixer.min_lag
    close(M * far, wanted * far)


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


# branches


@every_mixer
def test_silenced_branches_add_up(name, options):
    """What a composed mixer says is the sum of what each of its branches says while the others are silent."""
    mixer, h, _ = made(name, options)
    whole, branches = mixer(h, context()), list(mixer.branch_terms())
    if not branches:
        with pytest.raises(ValueError, match="has no branch 'ssm'; there are none"):
            mixer.silence(["ssm"])
        return
    assert "ssm" in branches and len(branches) > 1
    covered = [term for terms in mixer.branch_terms().values() for term in range(terms.start, terms.stop)]
    assert sorted(covered) == list(range(len(mixer.out_weight()[0])))
    parts = []
    for branch in branches:
        mixer.silence(other for other in branches if other != branch)
        parts.append(mixer(h, context()))
        assert parts[-1].norm() > 1e-3 * whole.norm()
    bias = mixer.out_weight()[1]  # in each of them
    torch.testing.assert_close(sum(parts) - (0.0 if bias is None else (len(parts) - 1) * bias), whole)
    mixer.silence([])
    assert torch.equal(mixer(h, context()), whole)


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
