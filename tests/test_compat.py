"""Private or undocumented names of other packages are used only in the compat.py of each of our packages."""

import ast
import re
from pathlib import Path

import pytest

from distill.exporters.proofs.proof import SCRIPTS

ROOT = Path(__file__).parent.parent
OVERRIDDEN = {"_keep_in_fp32_modules_strict"}  # of transformers' models, on a student itself; StudentMixin says why
ALONE = {ROOT / "distill/exporters/proofs" / f"{name}.py" for name in SCRIPTS.values()}  # run where nothing of ours is
PUBLIC = {"_asdict", "_fields", "_replace", "_exit"}  # of named tuples; of os, and documented


@pytest.mark.parametrize("package", ["distill", "students", "teachers"])
def test_private_parts_stand_in_compat(package):
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / package).rglob("*.py")}
    own = OVERRIDDEN | PUBLIC | {name for tree in trees.values() for name in _defined(tree)}
    for path, tree in trees.items():
        if path.name == "compat.py" or path in ALONE:
            continue
        used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                used += [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                used += [part for alias in node.names for part in alias.name.split(".")]
        foreign = {name for name in used if re.match("_[a-zA-Z]", name)} - own
        assert not foreign, f"{path.relative_to(ROOT)} uses {sorted(foreign)}; put it into {package}/compat.py"


def _defined(tree):
    """Private names that a file of ours defines: functions, attributes of `self` and of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (part for whole in targets for part in ast.walk(whole)):
                if isinstance(target, ast.Name):
                    yield target.id
                elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                    yield target.attr
