"""The pages with generated parts, found by their markers and rewritten.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`, NAME being one of `blocks.BLOCKS`, on any page of the
root, of docs/ or of recipes/. recipes/recipe.schema.json is generated whole.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from distill.errors import UserError, nearest
from distill.reference.blocks import BLOCKS
from distill.reference.json_schema import recipe_schema
from distill.shipped import SCHEMA, shipped_folder
from distill.strict_json import dumps

COMMAND = "make reference"
MARKER = re.compile(r"^<!-- generated: ", re.MULTILINE)
PART = re.compile(r"^(<!-- generated: ([\w ]+) -->\n)(?:.*?\n)??(<!-- end -->)$", re.MULTILINE | re.DOTALL)
DOCUMENT = re.compile(r"(?<![\w(/])(docs/([\w-]+\.md)(?:#[\w-]+)?)")  # named in a text, not linked yet
LINK = re.compile(r"\]\((docs/[\w./-]+(?:#[\w-]*)?|#[\w-]+)\)")


def written(root: Path) -> dict[Path, str]:
    """What every page with generated parts, and the JSON schema, should hold.

    Raises:
        UserError: a marker with a name that no part has, or without its end.
    """
    made: dict[str, str] = {}
    found = {shipped_folder() / SCHEMA: schema_text()}
    for page in [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "recipes").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        if len(MARKER.findall(text)) != len(PART.findall(text)):
            raise UserError(f"{page}: a line <!-- generated: NAME --> has no line <!-- end --> behind it, or an odd name")
        for name in [name for _, name, _ in PART.findall(text)]:
            if name not in BLOCKS:
                raise UserError(f"{page}: there is no generated part {name!r}; {nearest(name, BLOCKS)}")
            if name not in made:
                made[name] = BLOCKS[name]()
        parts = {name: _placed(part, page, root) for name, part in made.items()}
        found[page] = _filled(text, parts)
    return found


def stale(texts: Mapping[Path, str]) -> list[Path]:
    """The files that hold something else than they should."""
    return [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def schema_text() -> str:
    """The JSON schema of recipes as a file."""
    return dumps(recipe_schema(), SCHEMA, indent=1) + "\n"


def _filled(text: str, parts: Mapping[str, str]) -> str:
    """A page with its parts between their markers."""
    return PART.sub(lambda match: f"{match[1]}\n{parts[match[2]]}\n\n{match[3]}", text)


def _placed(text: str, page: Path, root: Path) -> str:
    """A part with its links from the page's own place, and pages that texts name as links."""
    text = DOCUMENT.sub(lambda match: f"[{match[2]}]({match[1]})", text)

    def link(match: re.Match[str]) -> str:
        target = match[1]
        path, mark, anchor = target.partition("#")
        relative = os.path.relpath(root / path, page.parent) if path else ""
        return f"]({'' if relative == page.name and mark else relative}{mark}{anchor})"

    return LINK.sub(link, text)
