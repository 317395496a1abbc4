"""Damaged or hostile data sets: descriptions that name files elsewhere, links, bad lines."""

import pytest

from distill.recipe import TextSource
from distill.text.preparation import prepare
from tests.distill.damaged_text.lines import LINE

pytestmark = pytest.mark.usefixtures("own_cache")


SETS = {
    "a file above": {"README.md": "---\nconfigs:\n- config_name: default\n  data_files: ../secret.jsonl\n---\n"},
    "a list": {
        "README.md": "---\nconfigs:\n- {config_name: d, data_files: [{split: train, path: [sub/../../secret.jsonl]}]}\n---\n"
    },
    "an absolute path": {"README.md": "---\nconfigs:\n- {config_name: d, data_files: {train: /SECRET}}\n---\n"},
    "a folder": {"README.md": "---\nconfigs:\n- {config_name: d, data_dir: ../other}\n---\n"},
    "an address": {"README.md": "---\nconfigs:\n- {config_name: d, data_files: 'https://example.org/x.jsonl'}\n---\n"},
    "an address in a chain": {
        ".huggingface.yaml": "configs:\n- {config_name: d, data_files: 'zip://x::hf://datasets/a/b'}\n"
    },
}


@pytest.mark.parametrize("name", SETS)
def test_a_description_that_names_files_elsewhere(refused, tmp_path, monkeypatch, name):
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("the network was asked"))
    (tmp_path / "set").mkdir()
    for place in ("secret.jsonl", "set/train.jsonl"):
        (tmp_path / place).write_text(LINE)
    for file, content in SETS[name].items():
        (tmp_path / "set" / file).write_text(content.replace("/SECRET", str(tmp_path / "secret.jsonl")))
    said = refused(hub=str(tmp_path / "set"))
    assert f"{next(iter(SETS[name]))} names " in said and "which is not in its folder" in said


BOMB = "---\na: &a [x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(9)) + "---\n"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (BOMB, "its YAML has aliases"),
        ("---\na: " + "[" * 3000 + "]" * 3000 + "\n---\n", "nested deeper than 50 levels"),
        ("---\na: [\n---\n", "does not describe a data set: while parsing"),
        (b"---\n\xff\n---\n", "does not describe a data set: 'utf-8' codec"),
        ("---\n" + "a: 1\n" * 300_000, "it is larger than 1,048,576 bytes"),
    ],
    ids=["aliases", "deep", "broken", "no text", "large"],
)
def test_a_description_that_is_none(refused, tmp_path, content, part):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(LINE)
    (tmp_path / "set" / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(hub=str(tmp_path / "set"))
    assert "README.md" in said and part in said and "mend it, or remove it" in said


def test_a_data_set_of_links(refused, tokenizer, tmp_path):
    """Links out of the folder are not followed; those of the hub's cache, to the blobs beside its snapshots, are."""
    (tmp_path / "secret.jsonl").write_text(LINE)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").symlink_to("../secret.jsonl")
    said = refused(hub=str(tmp_path / "set"))
    assert "train.jsonl leads to" in said and "secret.jsonl, which is not in the data set's folder" in said
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    for folder in (snapshot, tmp_path / "datasets--a--b" / "blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs" / "0123").write_text(LINE)
    (snapshot / "train.jsonl").symlink_to("../../blobs/0123")
    (snapshot / "README.md").write_text("---\nconfigs:\n- {config_name: d, data_files: train.jsonl}\n---\n# A set\n")
    source = TextSource(hub=str(snapshot))
    assert prepare([source], tokenizer, separator=None, seed=0, limit=None, where="x").is_dir()


def test_a_bad_line_of_a_data_set(refused, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-0.jsonl").write_text(LINE * 3)
    (tmp_path / "set" / "train-1.jsonl").write_text(LINE * 3 + '{"text": "a\n')
    assert "train-1.jsonl could not be read: line 4: " in refused(hub=str(tmp_path / "set"))
