"""One token in place calls few operations of `kernels/`, and changes no more of a state than its own column."""

import importlib
from collections import Counter
from threading import Thread

import pytest
import torch

import students
from students.backbone import fused, fused_layers
from students.kernels.op import folders
from tests.students.decoding_cases import CASES, check, new_cache, ordinary, student_of
from tests.students.layouts import text
from tests.teachers.tiny import EVERY, tiny_teacher

OUTSIDE = Counter(token_linear=3)  # of each layer: out of the mixer, into the MLP and out of it
MIXERS = {  # what else a layer calls for one token; under a window's reference stands attention's
    "discrete": ("M", Counter(token_linear=1, ssm_token=1)),
    "stock": ("M", Counter(token_linear=1, ssm_token=1, gated_norm=1)),
    "windows": ("W", Counter(token_linear=1, window_token=1, attention_places=1)),
    "windowed": ("M", Counter(token_linear=1, ssm_token=1, window_token=1, attention_places=1)),
    "B'MOJO-F": ("B", Counter(token_linear=1, ssm_token=1, window_token=1, attention_places=1, gated_norm=1)),
    "griffin": ("M", Counter(token_linear=1, conv_token=1, lru_token=1)),
    "mamba": ("M", Counter(token_linear=3, conv_token=1, selective_token=1)),
    "gated deltanet": ("M", Counter(token_linear=1, delta_token=1)),
}
KEPT = Counter(token_linear=1, rotary_token=1, attention_places=1)


@pytest.fixture
def called(monkeypatch):
    """How often each op is picked, by the names in the logs."""
    counts = Counter()

    def counted(module):
        pick = module.pick

        def picked(op, *arguments, **options):
            counts[op] += 1
            return pick(op, *arguments, **options)

        monkeypatch.setattr(module, "pick", picked)

    for folder in folders():
        module = importlib.import_module(f"students.kernels.{folder}")
        if hasattr(module, "pick"):
            counted(module)
    return counts


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_ops_of_a_token(teacher, name, called):
    pattern = CASES[name][0]
    student, (letter, wanted) = student_of(teacher, *CASES[name]), MIXERS[name]
    ids, cache = text(1, 9), new_cache(student)
    ordinary(student, ids, None, cache)
    decode = students.Decoder(student, cache, 3)
    called.clear()
    decode._step()
    expected = Counter(token_linear=1)  # the head
    for layer in (pattern * 4)[:4]:
        others = {"A": KEPT, "W": MIXERS["windows"][1]}
        expected += OUTSIDE + (wanted if layer == letter else others[layer])
    if name in ("windowed", "B'MOJO-F"):  # branch after branch, where the gate does not join them or they have one output
        expected["token_linear"] = called["token_linear"]
        assert called["token_linear"] <= 1 + 5 * 4
    assert called == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["windows", "windowed", "mixed", "stock"])
def test_a_token_writes_one_column(teacher, name):
    """Of every ring, at a place that moves by one and comes round; the rest stands where it stood."""
    student = student_of(teacher, *CASES[name])
    ids, cache = text(2, 9), new_cache(student)
    ordinary(student, ids, None, cache)
    decode = students.Decoder(student, cache, 12)
    rings = {
        (index, key): part
        for index, layer in enumerate(cache.layers)
        for key, part in (layer.tensors.items() if hasattr(layer, "tensors") else ())
        if key.rpartition(".")[2] in ("conv", "queue_x", "queue_B", "queue_log_a", "k", "v")
    }
    assert rings
    for at in range(9, 21):
        before = {key: part.clone() for key, part in rings.items()}
        decode(ids[:, at % 9 : at % 9 + 1])
        for key, part in rings.items():
            moved = (part != before[key]).flatten(2).any(2).any(0).nonzero()[:, 0].tolist()
            assert moved == [at % part.shape[1]], key


FAMILIES = ("llama-3.2-1b", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b")


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in EVERY])
def test_families_whose_layers_run_in_few_kernels(name):
    """Teachers and students, biases and norms on q and k too; what is wrapped runs as it is, with the same outcome."""
    teacher = tiny_teacher(name, num_hidden_layers=2)
    mixers = {"M": {"mixer": "discrete_mamba2"}}
    for model in (teacher.model, student_of(teacher, "MA", mixers)):
        assert fused_layers(model) == 2
        check(model, torch.randint(1, 96, (2, 16)), 5, 1e-5)
        handles = [model.base_model.layers[0].mlp.register_forward_hook(lambda *arguments: None)]
        assert fused_layers(model) == 1
        check(model, torch.randint(1, 96, (1, 16)), 5, 1e-5)
        handles.append(model.base_model.layers[1].mlp.gate_proj.register_forward_hook(lambda *arguments: None))
        check(model, torch.randint(1, 96, (1, 16)), 5, 1e-5)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_another_threads_calls_meanwhile_are_ordinary(teacher):
    student = student_of(teacher, *CASES["discrete"])
    ids, found = text(2, 12), []
    wanted = student(ids).logits
    with fused(student):
        other = Thread(target=lambda: found.append(student(ids).logits))
        other.start()
        other.join()
    assert torch.equal(found[0], wanted)
    assert not any("forward" in module.__dict__ for module in student.modules())


class Doubled(torch.nn.Module):
    """Stands around a linear layer, as an adapter does, and changes what it gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, x):
        return self.inner(x) * 1.5


@torch.no_grad()
@pytest.mark.parametrize("name", ["discrete", "stock", "windowed", "gated deltanet", "split heads", "shared keys"])
def test_what_stands_around_a_layer_is_called(teacher, name):
    student = student_of(teacher, *CASES[name])
    wrapped = [
        (module, key, child)
        for module in student.modules()
        for key, child in module.named_children()
        if type(child) is torch.nn.Linear and child is not student.lm_head
    ]
    for number, (module, key, child) in enumerate(wrapped):
        if number % 2 or name == "discrete":
            setattr(module, key, Doubled(child))
    check(student, text(2, 14), 6, 1e-5)
