"""The contract of DESIGN over every mixer of the table, alone and (for SSMs) with every kind of window branch."""

import itertools
from dataclasses import replace

import pytest
import torch

from students.cache import MixerState
from students.mixers import MIXERS, make_mixer, mixer_class, mixer_options
from students.mixers.mixer import Context, Mixer
from students.mixers.transfer import Projections
from tests.conftest import TOLERANCE
from tests.students.mixer_cases import (
    BIASED,
    SHAPE,
    TIME,
    attention_tensors,
    close,
    context,
    every_mixer,
    left_padded,
    made,
    packed,
    rope_tables,
)


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
