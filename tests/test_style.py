"""The size limits of CONTRIBUTING.md, and tables whose targets exist."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for package in ("distill", "students", "teachers") for path in (ROOT / package).rglob("*.py")]
TESTS = list((ROOT / "tests").rglob("*.py"))

ANNOTATED = ("distill", "students", "teachers")


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
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


def public_functions(node, inside=""):
    """Functions that others may call, by name: neither they nor a class around them are private."""
    for child in ast.iter_child_nodes(node):
        name = str(getattr(child, "name", ""))
        if name.startswith("_") and not name.endswith("__"):
            continue
        if isinstance(child, ast.FunctionDef):
            yield f"{inside}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from public_functions(child, f"{inside}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from public_functions(child, inside)


@pytest.mark.parametrize("package", ANNOTATED)
def test_public_functions_are_annotated(package):
    """Every argument and what is returned; Triton's own functions, which no checker reads, are marked `@no_type_check`."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for name, function in public_functions(ast.parse(path.read_text())):
            if "no_type_check" in [ast.unparse(decorator) for decorator in function.decorator_list]:
                continue
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            bare = [each.arg for each in named if each is not None and each.annotation is None]
            bare = [argument for argument in bare if argument not in ("self", "cls")]
            if bare or function.returns is None:
                found.append(f"{path.relative_to(ROOT)}:{function.lineno} {name}: {', '.join(bare) or 'what it returns'}")
    assert not found, "\n".join(found)


def test_every_ignored_error_has_its_code_and_a_reason():
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[a-z-]+\]  # .+", line), f"{path.relative_to(ROOT)}:{number}"
