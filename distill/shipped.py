"""`distill recipes`: the recipes that come with the package."""

import shutil
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.disk import writing
from distill.errors import UserError
from distill.recipe import find, shipped_folder


def list_recipes(console: Console) -> list[dict[str, str]]:
    """Print a table of the shipped recipes: name, teacher, what its first comment says.

    Returns:
        the same, a mapping for each recipe.
    """
    columns = ("recipe", "teacher", "what")
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column)
    rows = []
    for path in sorted(shipped_folder().glob("*.yaml")):
        rows.append((path.stem, yaml.safe_load(path.read_text())["teacher"], first_sentence(path)))
        table.add_row(*map(escape, rows[-1]))
    console.print(table)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def first_sentence(path: Path) -> str:
    """What the comment at the top of a recipe says, up to its first full stop."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0]


def copy_recipe(name: str, target: Path) -> Path:
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
