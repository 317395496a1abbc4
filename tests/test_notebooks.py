"""The notebooks do what they say: their cells run in order, here with a tiny random teacher, and carry no outputs."""

import json
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture
def renamed_teacher(tiny_teacher, tmp_path):
    """The tiny teacher with SmolLM2's name for the end of a document, which the quickstart's recipe asks for."""
    folder = tmp_path / "tiny-teacher"
    shutil.copytree(tiny_teacher, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("<end>", "<|endoftext|>"))
    return folder


def cells(path):
    """The code of a notebook, cell by cell."""
    read = json.loads(path.read_text())
    return [(cell["id"], "".join(cell["source"])) for cell in read["cells"] if cell["cell_type"] == "code"]


def test_quickstart(renamed_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTILL_TEACHER", str(renamed_teacher))
    monkeypatch.chdir(tmp_path)  # where the run folder goes
    names = {}
    for name, source in cells(FOLDER / "quickstart.ipynb"):
        exec(compile(source, name, "exec"), names)
    said = capsys.readouterr().out
    assert names["student"].layout.converted == [3] and names["folder"].student.is_dir()
    assert "untrained" in said and "imitate" in said  # both tables
    assert said.count(names["PROMPT"]) == 2  # teacher and student went on with it


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_nothing_is_left_of_an_earlier_run(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, (
                f"{path.name}: clear the outputs of {cell['id']}"
            )
