"""bitsandbytes: a student whose linear layers are quantised as it loads is that student, up to the rounding."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

import students
from tests.ecosystem.conftest import every_layout

pytestmark = pytest.mark.ecosystem
bitsandbytes = pytest.importorskip("bitsandbytes")


def rounded(student):
    """The student's linear layers as int8 makes them: rows of weights and rows of inputs in 127 steps."""
    for module in student.modules():
        if type(module) is torch.nn.Linear and module is not student.lm_head:
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.detach() / scale).round() * scale
            module.register_forward_pre_hook(_round_inputs)
    return student


def _round_inputs(module, inputs):
    (x,) = inputs
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return ((x / scale).round() * scale,)


@every_layout
@torch.no_grad()
def test_int8_is_the_student(student, ids, tmp_path):
    wanted = student(ids).logits
    student.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"], llm_int8_threshold=0.0)
    model = students.load(tmp_path, quantization_config=config, device_map="cpu")
    packed = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
    assert any("mixer" in name for name in packed) or not model.mixers
    found = model(ids).logits.float()
    usual = rounded(student)(ids).logits
    lost, off = (wanted - usual).norm(), (found - usual).norm()
    assert off < 1.5 * lost, f"off by {off / wanted.norm():.3f}, rounding alone by {lost / wanted.norm():.3f}"
    kl = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert kl < 0.05
    cache = model.new_cache()
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 13))]
    assert (torch.cat(pieces, 1).float() - found).norm() < lost
