"""Finds and rewrites the generated parts of pages.

A part is between the lines `<!-- generated: NAME -->` and `<!-- end -->` of a page in the root, in docs/ or in recipes/.
NAME is a key of `blocks.BLOCKS`. recipes/recipe.schema.json is generated whole.
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
DOCUMENT = re.compile(r"(?<![\w(/])(docs/([\w-]+\.md)(?:#[\w-]+)?)")  # a page named in text without a link
LINK = re.compile(r"\]\((docs/[\w./-]+(?:#[\w-]*)?|#[\w-]+)\)")


def written(root: Path) -> dict[Path, str]:
    """The up-to-date content of every page with generated parts, and of the JSON schema.

    Raises:
        UserError: a marker has an unknown name or no end.
    """
    made: dict[str, str] = {}
    found = {shipped_folder() / SCHEMA: schema_text()}
    for page in [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "recipes").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        if len(MARKER.findall(text)) != len(PART.findall(text)):
            raise UserError(f"{page}: a line <!-- generated: NAME --> has no line <!-- end --> after it, or an invalid name")
        for name in [name for _, name, _ in PART.findall(text)]:
            if name not in BLOCKS:
                raise UserError(f"{page}: there is no generated part {name!r}; {nearest(name, BLOCKS)}")
            if name not in made:
                made[name] = BLOCKS[name]()
        parts = {name: _placed(part, page, root) for name, part in made.items()}
        found[page] = _filled(text, parts)
    return found


def stale(texts: Mapping[Path, str]) -> list[Path]:
    """The files whose content is out of date or that do not exist."""
    return [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def schema_text() -> str:
    """The text of the JSON schema file of recipes."""
    return dumps(recipe_schema(), SCHEMA, indent=1) + "\n"


def _filled(text: str, parts: Mapping[str, str]) -> str:
    """A page's text with the parts put between their markers."""
    return PART.sub(lambda match: f"{match[1]}\n{parts[match[2]]}\n\n{match[3]}", text)


def _placed(text: str, page: Path, root: Path) -> str:
    """A part with links relative to the page, and with links for pages that its text names."""
    text = DOCUMENT.sub(lambda match: f"[{match[2]}]({match[1]})", text)

    def link(match: re.Match[str]) -> str:
        target = match[1]
        path, mark, anchor = target.partition("#")
        relative = os.path.relpath(root / path, page.parent) if path else ""
        return f"]({'' if relative == page.name and mark else relative}{mark}{anchor})"

    return LINK.sub(link, text)
