"""Recipes that select layers: of a teacher in which one head of one layer does all look-ups, and of a random one."""

import json
import re

import pytest
import torch

from tests.conftest import tiny_entries
from tests.distill.selection.planted import HEAD, HEADS, LAYER, LAYERS, SMALL


@pytest.fixture(scope="session")
def planted(tmp_path_factory, tokenizer):
    """The folder of a Llama whose attention adds nothing but in one head: that one looks at every token alike and says
    again what letters and digits it saw, so that what stands in a text is likelier. Embeddings are one-hot, MLPs silent."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size, width = 320, 64
    texts = [(token, tokenizer.decode([token]).strip()) for token in range(size)]
    seen = [token for token, text in texts if re.fullmatch(r"[a-z]|[0-9]+", text)]
    assert 36 <= len(seen) <= width
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=width,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(2)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
            if index == LAYER:
                part = slice(HEAD * width, HEAD * width + len(seen))
                layer.self_attn.q_proj.weight[HEAD * width : (HEAD + 1) * width] = 0.0
                layer.self_attn.v_proj.weight[part] = torch.eye(size)[seen]
                layer.self_attn.o_proj.weight[:, part] = 4.0 * torch.eye(size)[:, seen]
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def entries(planted, text_files):
    """A recipe for the planted teacher whose pattern asks for a selection."""
    found = tiny_entries(planted, text_files)
    found["mixers"] = {"M": {"mixer": "discrete_mamba2"}}
    found["stages"] = [{"initialise": {"tokens": 128}}, {"align": {"tokens": 256, "lr": 1e-3}}]
    return found | {"pattern": {"keep": 2, "by": "recall", **SMALL}}


@pytest.fixture
def tiny(tiny_teacher, text_files):
    """A recipe of two stages for a random teacher, which selects: for runs, which take longer the wider a teacher is."""
    found = tiny_entries(tiny_teacher, text_files)
    found["stages"] = [{"initialise": {"tokens": 128}}, {"align": {"tokens": 256, "lr": 1e-3}}]
    return found | {"pattern": {"keep": 0.25, "by": "kl", "protect": [], **SMALL}}


@pytest.fixture
def task_folder(tmp_path):
    """Items whose right choice stands in the question, far enough back."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ["zqx", "vkw", "jjq", "wxz", "kqv", "xxk"]
    lines = [
        {"ctx": f"{word} {word} is what the long story about the river and the town says. It says", "choices": [word, other]}
        for word, other in zip(words, words[1:] + words[:1], strict=True)
    ]
    (folder / "piqa.jsonl").write_text("\n".join(json.dumps({**line, "label": 0}) for line in lines))
    return folder
