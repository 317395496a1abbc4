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
    from distill.evaluate import EVALUATIONS
    from distill.export import EXPORTERS
    from distill.select.options import SCORERS
    from distill.stages import STAGES
    from students.mixers import MIXERS

    for table in (EVALUATIONS, EXPORTERS, MIXERS, SCORERS, STAGES):
        for target in table.values():
            module, _, attribute = target.partition(":")
            assert callable(getattr(import_module(module), attribute)), target
