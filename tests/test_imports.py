"""Imports point one way: kernels <- students <- distill -> teachers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "students/kernels": (
        "students.mixers",
        "students.model",
        "students.slot",
        "students.cache",
        "teachers",
        "distill",
        "transformers",
    ),
    "students": ("teachers", "distill"),
    "teachers": ("students", "distill"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                names = [node.module]
            for name in names:
                wrong = [bad for bad in FORBIDDEN[folder] if name == bad or name.startswith(bad + ".")]
                assert not wrong, f"{path} imports {name}"


def test_help_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; from typer.testing import CliRunner; from distill.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
