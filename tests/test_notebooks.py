"""The notebooks run cell by cell, here with a tiny random teacher, and are stored without outputs."""

import ast
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


@pytest.fixture
def ran(renamed_teacher, tmp_path, monkeypatch):
    """Run a notebook's cells: the names it leaves, and what Jupyter would show of each cell's last value."""
    monkeypatch.setenv("DISTILL_TEACHER", str(renamed_teacher))
    monkeypatch.chdir(tmp_path)  # where run folders go

    def run(notebook):
        names, shown = {}, []
        for name, source in cells(FOLDER / f"{notebook}.ipynb"):
            tree = ast.parse(source)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), names)
            value = last and eval(compile(ast.Expression(last.value), name, "eval"), names)
            if hasattr(value, "_repr_html_"):
                shown.append(value._repr_html_())
        return names, shown

    return run


def test_quickstart(ran, capsys):
    names, _ = ran("quickstart")
    said = capsys.readouterr().out
    assert names["student"].layout.converted == [3] and names["folder"].student.is_dir()
    assert "untrained" in said and "imitate" in said  # both tables
    assert said.count(names["PROMPT"]) == 2  # teacher and student went on with it


def test_attention_is_a_matrix(ran):
    names, shown = ran("attention_is_a_matrix")
    assert max(names[f"{what}_error"] for what in ("attention", "scan", "library")) < 1e-12
    assert names["layer_error"] < 1e-5
    assert all(scan == names["N"] for _, scan in names["ranks"].values())
    assert [attention for attention, _ in names["ranks"].values()] == [6, 12, 6]  # as much as the block has room for
    assert len(shown) == 1 and "data:image/png" in shown[0]


def test_three_views_of_a_mixer(ran):
    names, shown = ran("three_views_of_a_mixer")
    for view in ("chunked", "pieces", "by_matrix"):
        assert (names[view] - names["recurrent"]).norm() < 1e-12 * names["recurrent"].norm(), view
    assert names["same_size"] and names["convolution_error"] < 1e-12 and names["shifted"] > 0.5
    assert len(set(names["held"]["state"])) == 1 and "svg" in shown[0]


def test_one_layer_by_hand(ran):
    names, shown = ran("one_layer_by_hand")
    story = names["story"]
    assert story["initialise"]["align"] < story["copied"]["align"]
    assert story["orient"]["orient"] < story["initialise"]["orient"]
    assert story["align"]["align"] < story["orient"]["align"] < 1
    assert names["student"].layout.converted == [2] and len(shown) == 2


def test_reading_a_report(ran, capsys):
    names, shown = ran("reading_a_report")
    assert set(names["rows"]) >= {"teacher", "student", "twin", "window_everywhere"}
    said = capsys.readouterr().out
    assert "lower on" in said and "states zeroed" in said and "closed form" in said and "worst layers" in said
    assert "What was not run" in shown[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_nothing_is_left_of_an_earlier_run(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, (
                f"{path.name}: clear the outputs of {cell['id']}"
            )
