"""A linear layer is called: what stands around it counts, in every mixer, in the head and in the losses."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from distill.output_head import head_of
from students.kernels.linear_kl import linear_kl
from students.kernels.linear_kl.reference import logits_of
from students.wrapped import Rows, is_plain, taps, wide_linear
from tests.ecosystem.conftest import every_layout
from tests.ecosystem.layouts import linear_layers

pytestmark = pytest.mark.ecosystem


class Packed(nn.Linear):
    """A linear layer as quantised ones are: its weight holds codes, only calling it computes."""

    @classmethod
    def of(cls, linear):
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        made.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        made.bias, made.scale = linear.bias, scale
        return made

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Shifted(nn.Module):
    """A parametrisation that moves every weight."""

    def forward(self, weight):
        return weight * 1.25 + 0.01


def changed(linear):
    """A weight that nothing but a test would choose."""
    return linear.weight.detach() * 1.25 + 0.01


def pack(student, name):
    student.set_submodule(name, Packed.of(student.get_submodule(name)))


def unpacked(linear):
    packed = Packed.of(linear)
    return packed.weight.float() * packed.scale


def parametrise(student, name):
    parametrize.register_parametrization(student.get_submodule(name), "weight", Shifted())


def hook(student, name):
    """A forward hook that computes with another weight."""
    linear = student.get_submodule(name)
    weight = changed(linear)
    linear.register_forward_hook(lambda module, inputs, output: nn.functional.linear(inputs[0], weight, module.bias))


def replace_forward(student, name):
    """What accelerate's hooks do: the module's own `forward` stands in its dictionary."""
    linear = student.get_submodule(name)
    weight = changed(linear)
    linear.forward = lambda x: nn.functional.linear(x, weight, linear.bias)


def weight_norm(student, name):
    """The older weight norm: a hook before the call makes the weight, here of twice the length."""
    linear = student.get_submodule(name)
    nn.utils.weight_norm(linear)
    linear.weight_g.data *= 2


WAYS = {
    "packed": (pack, unpacked),
    "parametrised": (parametrise, changed),
    "hooked": (hook, changed),
    "another forward": (replace_forward, changed),
    "weight norm": (weight_norm, lambda linear: 2 * linear.weight.detach()),
}


@every_layout
@pytest.mark.parametrize("way", WAYS)
def test_what_stands_around_linear_layers_counts(student, way, ids, same):
    """The same logits as with plain layers whose weights are those that the wrappers compute with; token by token too."""
    wrap, weight_of = WAYS[way]
    names = list(linear_layers(student))
    kept = {name: student.get_submodule(name).weight.detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            linear = student.get_submodule(name)
            linear.weight.copy_(weight_of(linear))
        wanted = student(ids).logits
        for name in names:
            student.get_submodule(name).weight.copy_(kept[name])
        before = student(ids).logits
        for name in names:
            wrap(student, name)
        same(student(ids).logits, wanted)
        cache = student.new_cache()
        pieces = [student(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 12), (12, 13))]
        same(torch.cat(pieces, 1), wanted, 1e-3)
    assert (before - wanted).abs().max() > 1e-3


def convolutions(student):
    return {name: module for name, module in student.named_modules() if isinstance(module, nn.Conv1d)}


@pytest.mark.parametrize("layout", ["mamba2", "rg_lru", "gated_deltanet behind windows"])
@pytest.mark.parametrize("way", ["parametrised", "another forward", "weight norm"])
def test_what_stands_around_convolutions_counts(student, way, ids, same):
    with torch.no_grad():
        wanted = {}
        for name, conv in convolutions(student).items():
            wanted[name] = 2 * conv.weight.clone() if way == "weight norm" else changed(conv)
        kept = {name: conv.weight.clone() for name, conv in convolutions(student).items()}
        for name, conv in convolutions(student).items():
            conv.weight.copy_(wanted[name])
        logits = student(ids).logits
        for name, conv in convolutions(student).items():
            conv.weight.copy_(kept[name])
            if way == "another forward":
                weight = wanted[name]
                conv.forward = lambda x, w=weight, c=conv: nn.functional.conv1d(x, w, c.bias, groups=c.groups)
            else:
                WAYS[way][0](student, name)
        same(student(ids).logits, logits)


def test_what_is_plain():
    """Only there a fused form reads the weight; each of these must be called."""
    plain, x = nn.Linear(6, 8), torch.randn(2, 6)
    assert is_plain(plain) and not is_plain(nn.Conv1d(4, 4, 3)) and is_plain(nn.Conv1d(4, 4, 3), nn.Conv1d)
    assert not is_plain(nn.Linear(6, 8, device="meta")) and not is_plain(Packed.of(plain))
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(plain, register)(lambda *call: None)
        assert not is_plain(plain), register
        handle.remove()
        assert is_plain(plain)
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)
    assert not is_plain(plain)
    handle.remove()
    plain._hf_hook = object()
    assert not is_plain(plain)
    del plain._hf_hook
    prune.random_unstructured(plain, "weight", 0.5)
    assert not is_plain(plain)
    calls = []
    counted = nn.Linear(6, 8)
    counted.register_forward_hook(lambda *call: calls.append(1))
    rows = Rows(counted, x)
    assert torch.allclose(torch.cat([rows(0, 3), rows(3, None)], -1), counted(x)) and len(calls) == 2  # one of them ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_compute_the_same(dtype):
    """A hook that does nothing changes nothing but the way."""
    linear, x, bias = nn.Linear(6, 8, dtype=dtype), torch.randn(3, 6, dtype=dtype), torch.randn(8)
    conv = nn.Conv1d(5, 5, 4, groups=5, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    found = []
    for _ in range(2):
        rows = Rows(linear, x)
        filters, constant = taps(conv, x)
        found.append([rows(2, 5), rows.wide(-3, None, bias[-3:]), wide_linear(x, linear, bias), filters, constant])
        linear.register_forward_hook(lambda *call: None)
        conv.register_forward_hook(lambda *call: None)
    for read, called in zip(*found, strict=True):
        assert read.dtype == called.dtype and torch.allclose(read, called, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", ["discrete_mamba2"])
@pytest.mark.parametrize("way", WAYS)
def test_the_losses_call_a_head_that_something_stands_around(student, way, ids):
    """Value and gradients of the divergence as through a plain head of the same weight."""
    wrap, weight_of = WAYS[way]
    student.lm_head.weight = nn.Parameter(torch.randn_like(student.lm_head.weight))
    plain, hidden = head_of(student), student.hidden(ids, None).detach().flatten(0, 1)
    weight = weight_of(student.lm_head)
    teacher_hidden, weights, targets = (
        torch.randn_like(hidden),
        torch.rand(len(hidden)),
        torch.randint(0, 320, (len(hidden),)),
    )
    wrap(student, "lm_head")
    wrapped, found = head_of(student), []
    assert wrapped.call is not None and plain.call is None
    for head in (plain._replace(weight=weight), wrapped):
        leaf = hidden.clone().requires_grad_()
        loss = linear_kl(leaf, head, teacher_hidden, plain, weights, targets, temperature=2.0, ce_weight=0.3)
        loss.backward()
        found.append((loss.detach(), leaf.grad, logits_of(hidden, head)))
    for wanted, got in zip(*found, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="320 entries and the teacher's 7"):
        linear_kl(hidden, wrapped, teacher_hidden, plain._replace(weight=weight[:7]), weights)


@pytest.mark.parametrize("layout", ["mamba2"])
def test_a_plain_student_is_read_not_called(student, ids, monkeypatch):
    """The fused way is still the one that is taken: no packed projection is computed whole."""
    called = []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self) or nn.functional.linear(x, self.weight))
    student(ids)
    assert called and not any(mixer.in_proj is each for mixer in student.mixers.values() for each in called)
