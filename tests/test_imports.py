"""Import directions: kernels <- students <- distill -> teachers, down the floors of distill/, without cycles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("distill", "students", "teachers")
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
# The rooms of distill/, floor by floor from the top: a folder, or a file of distill/ itself. An arrow goes down.
FLOORS = (
    ("cli",),
    ("", "api"),  # "" is distill/__init__.py
    ("beforehand", "machine", "plan_table"),
    ("reference",),
    ("answering", "benchmarks", "caching", "diagnosis", "generation", "launching", "planning"),
    ("training",),
    ("recipe_file",),
    ("exporters",),
    ("reports",),
    ("selection",),
    ("evaluation",),
    ("footprint", "runs"),
    ("stages",),
    ("loading", "logits", "text"),
    ("teacher_type",),
    ("build", "output_head", "packed_attention", "recipe", "shipped", "starting"),
    ("disk", "generation_config", "memory", "mixed_types", "moments", "chat", "schema", "strict_json", "yaml_file"),
    ("console", "reading"),
    ("division", "processes", "ranges", "sampling"),
    ("compat", "errors", "version"),
)


def modules() -> dict[str, Path]:
    """Every module of the three packages, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Every import statement, those inside functions included, those for type checkers alone left out."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        found += imports(node)
    return found


def arrows(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that one imports."""
    found = set()
    for node in imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path} imports relatively"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & set(known)
            if submodules - set(known):
                found.add(node.module)
    return (found & set(known)) - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: arrows(name, path, known) for name, path in known.items()}


def circle_in(arrows_of: dict[str, set[str]]) -> list[str] | None:
    """A path of arrows that ends where it began, if there is one."""
    done, path = set(), []

    def visit(name: str) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for other in sorted(arrows_of.get(name, ())):
            if circle := visit(other):
                return circle
        path.pop()
        done.add(name)
        return None

    return next((circle for name in sorted(arrows_of) if (circle := visit(name))), None)


def room(name: str) -> str:
    """The folder, or the file of the package's own, that a module of distill/ is in."""
    return name.split(".")[1] if "." in name else ""


def test_the_search_for_circles_finds_one():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    late = "def f():\n    if x:\n        from a.b import c\nif TYPE_CHECKING:\n    import d\n"
    assert [ast.unparse(node) for node in imports(ast.parse(late))] == ["from a.b import c"]


def test_no_circle_of_modules():
    circle = circle_in(graph())
    assert circle is None, " -> ".join(circle)


def test_arrows_go_down_the_floors():
    floors = {name: level for level, rooms in enumerate(reversed(FLOORS)) for name in rooms}
    ours = {name: {other for other in others if other.startswith("distill")} for name, others in graph().items()}
    ours = {name: others for name, others in ours.items() if name.startswith("distill")}
    assert {room(name) for name in ours} == set(floors), "a file or folder of distill/ without a floor, or gone"
    for name, others in ours.items():
        for other in others:
            same = room(name) == room(other) or {room(name), room(other)} == {"", "api"}
            assert same or floors[room(name)] > floors[room(other)], f"{name} imports {other}, which is no floor below it"


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows_between_packages(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                wrong = [bad for bad in FORBIDDEN[folder] if name == bad or name.startswith(bad + ".")]
                assert not wrong, f"{path} imports {name}"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from distill.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
