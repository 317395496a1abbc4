"""peft: adapters on every linear layer learn, leave a student what it is at their start, and merge."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import students
from tests.ecosystem.conftest import every_layout
from tests.ecosystem.layouts import linear_layers

pytestmark = pytest.mark.ecosystem


def adapted(student, targets="all-linear", **options):
    torch.manual_seed(1)
    return get_peft_model(student, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))


def moved(model):
    """The adapters after steps that a test makes up."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@every_layout
def test_adapters_start_as_nothing_and_all_learn(student, ids, same):
    wanted, names = student(ids).logits.detach(), set(linear_layers(student))
    model = adapted(student)
    assert {name for name, module in student.named_modules() if hasattr(module, "lora_B")} == names
    same(model(ids).logits, wanted, 1e-5)
    model.train()
    model(ids, labels=ids).loss.backward()
    still = [name for name, part in model.named_parameters() if "lora_B" in name and not part.grad.abs().max() > 0]
    assert not still


@every_layout
@pytest.mark.parametrize("start", ["pissa", "dora"])
def test_starts_that_move_the_weight_leave_the_logits(student, start, ids, same):
    wanted = student(ids).logits.detach()
    model = adapted(student, **({"init_lora_weights": "pissa"} if start == "pissa" else {"use_dora": True}))
    same(model(ids).logits, wanted)


@every_layout
def test_merging_gives_the_same_logits(student, ids, same, tmp_path):
    plain = student(ids).logits.detach()
    model = moved(adapted(student)).eval()
    with torch.no_grad():
        wanted = model(ids).logits
        assert (wanted - plain).abs().max() > 1e-3
        cache = student.new_cache()
        pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 12), (12, 13))]
        same(torch.cat(pieces, 1), wanted, 1e-3)
        merged = model.merge_and_unload()
        same(merged(ids).logits, wanted)
        merged.save_pretrained(tmp_path)
        same(students.load(tmp_path)(ids).logits, wanted)


@every_layout
def test_adapters_travel_alone(student, ids, same, tmp_path):
    """Saved beside no weights and put on the same student again, as `PeftModel.from_pretrained` does."""
    from peft import PeftModel

    student.save_pretrained(tmp_path / "student")
    model = moved(adapted(student)).eval()
    model.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(students.load(tmp_path / "student"), tmp_path / "adapters").eval()
    same(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("layout", "name"), [("rg_lru", "conv_1d"), ("mamba1", "conv1d")])
def test_an_adapter_on_a_convolution_counts(student, name, ids, same):
    width = student.mixers[0].get_submodule(name).in_channels
    wanted = student(ids).logits.detach()
    model = get_peft_model(student, LoraConfig(r=width, target_modules=[name]))
    same(model(ids).logits, wanted, 1e-5)
    model(ids, labels=ids).loss.backward()
    assert all(part.grad.abs().max() > 0 for which, part in model.named_parameters() if "lora_B" in which)
    assert (moved(model)(ids).logits - wanted).abs().max() > 1e-3  # peft does not merge adapters of depthwise convolutions


@pytest.mark.parametrize("layout", ["mamba2", "Hymba"])
@pytest.mark.parametrize("kind", ["IA3", "LoHa", "OFT", "VeRA", "prompt"])
def test_other_adapters_learn(student, kind, ids):
    import peft

    config = {
        "IA3": lambda: peft.IA3Config(target_modules="all-linear", feedforward_modules=[], task_type="CAUSAL_LM"),
        "LoHa": lambda: peft.LoHaConfig(r=4, target_modules="all-linear"),
        "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules="all-linear"),
        "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["o_proj" if layout_has_attention(student) else "out_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]()
    model = get_peft_model(student, config).train()
    model(ids, labels=ids).loss.backward()
    learns = {name: part for name, part in model.named_parameters() if part.requires_grad}
    moving = [name for name, part in learns.items() if part.grad is not None and part.grad.abs().max() > 0]
    halves = 2 if kind in ("LoHa", "VeRA") else 1  # of which one starts at 0, so that its partner has no gradient yet
    assert learns and len(moving) >= len(learns) / (2 * halves)


def layout_has_attention(student):
    return any("o_proj" in name for name in linear_layers(student))
