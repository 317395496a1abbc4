"""The size budget of CONTRIBUTING.md, and tables whose targets exist."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for package in ("distill", "students", "teachers") for path in (ROOT / package).rglob("*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_size(path):
    text = path.read_text()
    limit = 500 if "kernels" in path.parts else 300
    assert text.count("\n") <= limit
    assert path.stem not in {"utils", "common", "helpers", "misc"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and "kernels" not in path.parts:
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name} is too long"


def test_table_targets_exist():
    from distill.evaluation.suites import EVALUATIONS
    from distill.exporters import EXPORTERS
    from distill.selection import SCORERS
    from distill.stages import STAGES
    from students.mixers import MIXERS

    for table in (EVALUATIONS, EXPORTERS, MIXERS, SCORERS, STAGES):
        for target in table.values():
            module, _, attribute = target.partition(":")
            assert callable(getattr(import_module(module), attribute)), target


def test_no_file_names_a_stage_but_its_own():
    """What a stage is, it declares: a stage of its own name elsewhere would be a list that adding one has to find."""
    from distill.stages import STAGES

    for path in (ROOT / "distill").rglob("*.py"):
        if path.relative_to(ROOT / "distill") == Path("stages/__init__.py"):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        codecs = {id(node.value) for node in nodes if isinstance(node, ast.keyword) and node.arg == "errors"}
        found = {node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in codecs}
        assert not found & set(STAGES), f"{path} compares names of stages"


def test_contributing_names_every_file_of_distill():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    for path in sorted((ROOT / "distill").iterdir()):
        if path.suffix == ".py" or (path / "__init__.py").exists():
            name = f"{path.name}/" if path.is_dir() else path.name
            assert f"`{name}`" in tree, f"CONTRIBUTING.md's tree lacks distill/{name}"
