"""On a GPU: teachers with int8 weights and moments of 8 bits, against bfloat16 ones and float32 ones: losses and memory."""

import gc

import pytest
import torch
from transformers import LlamaConfig

from distill import moments
from distill.benchmarks import steps
from distill.benchmarks.steps import random_teacher
from distill.build import build
from distill.recipe_file import load
from distill.stages import stages_of
from distill.stages.align import Align
from distill.training.eight_bits import EightBitAdamW
from distill.training.optim import make_optimizer, set_rates
from students.config import Layout

pytestmark = pytest.mark.gpu
pytest.importorskip("torchao")
SMOLLM2 = "smollm2-135m_mamba2-hybrid"


def measured(stage, *changes):
    """Steps of a stage of SmolLM2's shape."""
    recipe = load(SMOLLM2, [f"stages.{stage}.batch=8", f"stages.{stage}.micro_batch=4", *changes])
    gc.collect()
    torch.cuda.empty_cache()
    return steps._steps(recipe, next(entry for entry in stages_of(recipe) if entry.name == stage), False)


@pytest.fixture
def two_teachers():
    """A random Llama in bfloat16, and the same with int8 weights."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    found = []
    for narrow in (False, True):
        torch.manual_seed(0)
        found.append(random_teacher(LlamaConfig(vocab_size=8192, **sizes), torch.device("cuda"), torch.bfloat16))
        if narrow:
            found[-1].quantise()
    return found


def test_int8_teachers(two_teachers):
    """Half the bytes of linear layers, outputs within a few percent, and students made of the numbers as they were."""
    plain, narrow = two_teachers
    ids = torch.randint(8192, (2, 256), device="cuda")
    places = torch.arange(256, device="cuda").expand(2, -1)
    wanted, found = (teacher.hidden(ids, places).float() for teacher in two_teachers)
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05
    layer = plain.model.model.layers[0].mlp.up_proj.weight
    held = narrow.model.model.layers[0].mlp.up_proj.weight
    inner = [getattr(held, name) for name in held.__tensor_flatten__()[0]]
    size = sum(tensor.numel() * tensor.element_size() for tensor in inner)
    assert held.is_cuda and size < 0.52 * layer.numel() * layer.element_size()
    layout = Layout.over(4, "AM", {"M": {"mixer": "mamba2"}})
    one, other = (build(teacher, layout)[0].state_dict() for teacher in two_teachers)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_steps_with_an_int8_teacher():
    wanted, found = (measured("align", f"teacher_dtype={kind}") for kind in ("bfloat16", "int8"))
    print(f"bfloat16 {wanted['gib']} GiB, loss {wanted['loss']:.5f}; int8 {found['gib']} GiB, loss {found['loss']:.5f}")
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.05) and found["loss"] != wanted["loss"]


@pytest.mark.parametrize(("stage", "spared"), [("align", 0.33), ("imitate", 0.97)])
def test_moments_of_8_bits_take_a_quarter(stage, spared):
    """58.9M and 174.0M parameters train: three quarters of 8 bytes each are spared."""
    wanted, found = (measured(stage, f"stages.{stage}.optimizer={kind}") for kind in ("adamw", "adamw_8bit"))
    print(f"{stage}: {wanted['gib']} GiB, {wanted['tokens_per_second']} tokens/s, loss {wanted['loss']:.5f}; 8 bits", found)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert wanted["gib"] - found["gib"] == pytest.approx(spared, rel=0.25)


def test_compiled_and_uncompiled_steps():
    """The same steps to rounding, divided rows' block lengths among them; what was saved is what goes on. Rounding may
    give a moment halfway between two codes the other one, as it does to a few in a million: these end within 1e-3."""
    ways = []
    for compiled in (True, False):
        torch.manual_seed(0)
        shapes = ((1024, 4096), (512, 576), (64, 192), (300,))
        parameters = {str(shape): torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes}
        options = Align.Options(tokens=1, lr=1e-2, optimizer="adamw_8bit", compile=compiled)
        optimizer = make_optimizer({name: ("ssm", p) for name, p in parameters.items()}, options)
        assert isinstance(optimizer, EightBitAdamW) and optimizer._compiled == compiled
        for step in range(3):
            set_rates(optimizer, 1 / (step + 1))
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, device="cuda")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
            beside = torch.cuda.max_memory_allocated() - before
            optimizer.zero_grad()
        largest = 4 * max(parameter.numel() for parameter in parameters.values())
        print(f"compiled {compiled}: {beside / largest:.1f} times the largest parameter beside")
        assert beside < (4 if compiled else 16) * largest
        ways.append(parameters)
    for name, parameter in ways[0].items():
        apart = (parameter - ways[1][name]).abs().detach()
        rounded = 1e-5 * (1 + parameter.abs().detach())
        print(f"{name}: {int((apart > rounded).sum())} of {apart.numel()} beyond rounding, at most {apart.max():.1e}")
        assert (apart > rounded).sum() <= 2e-5 * apart.numel() and apart.max() < 1e-3
    assert moments.block_of((512, 576)) == 192
