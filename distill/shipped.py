"""Files that come with the package: recipes, which `distill recipes` lists and copies, configs of teachers, and text."""

import filecmp
import logging
import os
from pathlib import Path

from rich.table import Table

from distill.disk import new_file, writing
from distill.errors import UserError, nearest
from distill.yaml_file import read

SCHEMA = "recipe.schema.json"  # beside the recipes
FOR_EDITORS = "# yaml-language-server:"  # the beginning of the line that names a file's schema for editors
_log = logging.getLogger(__name__)


def shipped_folder() -> Path:
    """The folder of shipped recipes. It is next to the package, both in a clone and in an installed wheel."""
    return Path(__file__).parent.parent / "recipes"


def find(reference: str | Path) -> Path:
    """The file of a recipe, given by its path or by the name of a shipped recipe.

    Raises:
        UserError: there is none.
    """
    path = Path(reference)
    if os.path.isfile(path):  # also False for invalid file names
        return path
    try:
        return find_shipped(path)
    except UserError as error:
        said = str(error).partition("; ")[2]
        raise UserError(f"there is no recipe {str(reference)!r}: no such file, and of the shipped ones {said}") from error


def find_shipped(reference: str | Path) -> Path:
    """The file of a shipped recipe, by its name. No other file is opened.

    Raises:
        UserError: there is none of that name.
    """
    shipped = {file.stem: file for file in shipped_folder().glob("*.yaml")}
    path = Path(reference)
    name = path.name.removesuffix(".yaml")
    if name in shipped and path.parent in (Path("."), Path("recipes")):
        return shipped[name]
    raise UserError(f"there is no shipped recipe {str(reference)!r}; {nearest(name, shipped)}")


def list_recipes() -> list[dict[str, str]]:
    """List the shipped recipes: `recipe` (the name), `teacher`, and `what` (the first sentence of its comment)."""
    return [
        {"recipe": path.stem, "teacher": read(path)["teacher"], "what": first_sentence(path)}
        for path in sorted(shipped_folder().glob("*.yaml"))
    ]


def recipes_table(rows: list[dict[str, str]]) -> Table:
    """The rows of `list_recipes` as a table to print."""
    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    return table


def first_sentence(path: Path) -> str:
    """The first sentence of the comment at the top of a recipe."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(FOR_EDITORS):
            lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0]


def copy_shipped(name: str, target: Path) -> Path:
    """Copy a shipped recipe to a file or into a folder, with the JSON schema that its first line names for editors.

    A different file of the schema's name is kept, with a warning in the log.

    Raises:
        UserError: no such recipe, a file in the way, or a place that cannot be written to.
    """
    source = find_shipped(name)
    target = target / source.name if target.is_dir() else target
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; name another file")
    with writing(target, "name another file or folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_file(target) as opened:
            opened.write(source.read_bytes())
        _copy_schema(target.parent)
    return target


def _copy_schema(folder: Path) -> None:
    source, target = shipped_folder() / SCHEMA, folder / SCHEMA
    if not os.path.lexists(target):
        with new_file(target) as opened:
            opened.write(source.read_bytes())
    elif not target.is_file() or not filecmp.cmp(source, target, shallow=False):
        _log.warning("%s differs from this version's schema and is kept; `distill schema` prints this version's", target)
