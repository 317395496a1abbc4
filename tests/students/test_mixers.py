"""The contract of DESIGN over every mixer of the table, alone and (for SSMs) with every kind of window branch."""

import itertools
from dataclasses import replace

import pytest
import torch

from students.cache import MixerState
from students.mixers import MIXERS, make_mixer, mixer_class, options_of
from students.mixers.mixer import Context, Shape
from tests.conftest import TOLERANCE

SHAPE = Shape(d_model=24, n_heads=4, n_kv_heads=2, head_dim=8)
BIASED = replace(SHAPE, qkv_bias=True, o_bias=True)
TIME = 70
WINDOW = {"size": 7, "sinks": 2}

# Every mixer of the table appears as it is, and every SSM with a window; here is what to try beyond that.
FURTHER = {
    "attention": [{"window": 7, "sinks": 2}, {"window": 5}, {"rope": False}],
    "discrete_mamba2": [{"rope": True, "norm": True}, {"d_state": 4}, {"d_state": 16, "d_conv": 2}, {"lag": 3}],
    "gated_deltanet": [{"d_conv": 2}],
    "gla": [{"gate_rank": 30}],
    "longhorn": [{"d_state": 4, "beta_rank": 30}, {"d_conv": 2}],
    "mamba2": [{"expand": 1}, {"n_groups": 2}, {"n_groups": 1, "d_state": 4}, {"lag": 3}],
    "retention": [{"decay": "lightning"}, {"rope": False}],
}
WINDOWS = [{**WINDOW, "own": own, "lag": lag, "gate": gate} for own, lag, gate in itertools.product((True, False), repeat=3)]
VARIANTS = [(name, {}) for name in MIXERS]
VARIANTS += [(name, options) for name, further in FURTHER.items() for options in further]
VARIANTS += [
    (name, {"window": window})
    for name in MIXERS
    if "window" in options_of(name) and name != "attention"
    for window in WINDOWS
    if (window["own"] or mixer_class(name).lends) and (not window["lag"] or "lag" in options_of(name))
]
every_mixer = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value).replace("'", ""))


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
    transfer = mixer.from_attention(**attention_tensors(shape, dtype))
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
    if shape.qkv_bias and options.get("window") and name != "attention" and not options["window"]["own"]:
        with pytest.raises(ValueError, match="no place for the biases of q and k"):
            made(name, options, shape)
        return
    mixer, _, transfer = made(name, options, shape)
    tensors = {key for key, _ in mixer.named_parameters()} | {key for key, _ in mixer.named_buffers()}
    assert set(transfer.sources) == tensors
    assert transfer.used == set(attention_tensors(shape))
    assert set(mixer.roles()) == {key for key, _ in mixer.named_parameters()}
    assert set(mixer.roles().values()) <= {"new", "ssm", "window"}
    assert all(torch.isfinite(tensor).all() for tensor in mixer.state_dict().values())


@every_mixer
def test_gradients_reach_every_parameter(name, options):
    mixer, h, _ = made(name, options)
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
    wanted = mixer.matrix(parts)[:, [terms[0] for terms in mixer.head_terms()]]
    lag = torch.arange(TIME)[:, None] - torch.arange(TIME)
    far = lag >= mixer.min_lag
    close(M * far, wanted * far)


@pytest.mark.parametrize("name", [name for name in MIXERS if mixer_class(name).has_decay])
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
    mixer.from_attention(**tensors)
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
    mixer.from_attention(**tensors)
    out = 0.0
    for head in range(SHAPE.n_heads):
        q, k, v = (h @ tensors[part][head if part == "q" else head // 2].T for part in "qkv")
        lag = (torch.arange(TIME)[:, None] - torch.arange(TIME)).clamp(min=0)
        half_life = torch.nn.functional.softplus(mixer.a_proj.bias[head])
        M = (q @ k.transpose(1, 2) * SHAPE.head_dim**-0.5 * torch.exp(-half_life * lag)).tril()
        out = out + M @ v @ tensors["o"][head].T
    close(mixer(h, context()), out, 1e-8)


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


def test_mistakes_are_named():
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
    with pytest.raises(ValueError, match="step takes one token"):
        mixer, h, _ = made("mamba2", {})
        mixer.step(h, context())
