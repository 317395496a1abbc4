"""What comes with the package: recipes, which `distill recipes` lists and copies, configs of teachers, and text."""

import filecmp
import logging
import os
from pathlib import Path

from rich.table import Table

from distill.disk import new_file, writing
from distill.errors import UserError, nearest
from distill.yaml_file import read

SCHEMA = "recipe.schema.json"  # beside the recipes
FOR_EDITORS = "# yaml-language-server:"  # begins a line that tells editors which schema a file has
_log = logging.getLogger(__name__)


def shipped_folder() -> Path:
    """Where the recipes are that come with the package: beside it, in a clone and in an installed wheel alike."""
    return Path(__file__).parent.parent / "recipes"


def find(reference: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        UserError: there is none.
    """
    path = Path(reference)
    if os.path.isfile(path):  # False of names that no file can have, too
        return path
    try:
        return find_shipped(path)
    except UserError as error:
        said = str(error).partition("; ")[2]
        raise UserError(f"there is no recipe {str(reference)!r}: no such file, and of the shipped ones {said}") from error


def find_shipped(reference: str | Path) -> Path:
    """The file of a shipped recipe, by its name; no other file is opened.

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
    """The shipped recipes: `recipe`, `teacher`, and `what` their first comment says."""
    return [
        {"recipe": path.stem, "teacher": read(path)["teacher"], "what": first_sentence(path)}
        for path in sorted(shipped_folder().glob("*.yaml"))
    ]


def recipes_table(rows: list[dict[str, str]]) -> Table:
    """What `list_recipes` returned, to print."""
    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    return table


def first_sentence(path: Path) -> str:
    """What the comment at the top of a recipe says, up to its first full stop."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(FOR_EDITORS):
            lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0]


def copy_shipped(name: str, target: Path) -> Path:
    """Copy a shipped recipe to a file or into a folder, and beside it the JSON schema that its first line names to editors.

    A file of the schema's name that is another one stays, which the log says.

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
        _log.warning(
            "%s is another file than this version's schema and stays; `distill schema` prints this version's", target
        )
