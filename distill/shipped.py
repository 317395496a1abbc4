"""What comes with the package: recipes, which `distill recipes` lists and copies, configs of teachers, and text."""

import shutil
from pathlib import Path

import yaml
from rich.markup import escape
from rich.table import Table

from distill.disk import writing
from distill.errors import UserError, nearest


def shipped_folder() -> Path:
    """Where the recipes are that come with the package: beside it, in a clone and in an installed wheel alike."""
    return Path(__file__).parent.parent / "recipes"


def find(reference: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        UserError: there is none.
    """
    path = Path(reference)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_folder().glob("*.yaml")}
    name = path.name.removesuffix(".yaml")
    if name in shipped and path.parent in (Path("."), Path("recipes")):
        return shipped[name]
    raise UserError(f"there is no recipe {str(reference)!r}: no such file, and of the shipped ones {nearest(name, shipped)}")


def list_recipes() -> list[dict[str, str]]:
    """The shipped recipes: `recipe`, `teacher`, and `what` their first comment says."""
    return [
        {"recipe": path.stem, "teacher": yaml.safe_load(path.read_text())["teacher"], "what": first_sentence(path)}
        for path in sorted(shipped_folder().glob("*.yaml"))
    ]


def recipes_table(rows: list[dict[str, str]]) -> Table:
    """What `list_recipes` returned, to print."""
    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    return table


def first_sentence(path: Path) -> str:
    """What the comment at the top of a recipe says, up to its first full stop."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0]


def copy_shipped(name: str, target: Path) -> Path:
    """Copy a shipped recipe to a file or into a folder.

    Raises:
        UserError: no such recipe, a file in the way, or a place that cannot be written to.
    """
    source = find(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists already; name another file")
    with writing(target, "name another file or folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
