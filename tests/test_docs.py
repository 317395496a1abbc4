"""README stays short, and the commands and names that README and the pages tell a reader to type exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

import distill
import students
import teachers
from tests.verbs import parsed

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^distill (?!--)(?:[^\n'\"&;#]|'[^']*'|\"[^\"]*\")*", re.MULTILINE
)  # a quoted text may have several lines
ids = {"ids": lambda path: path.name}


def test_readme_has_at_most_900_words_outside_code():
    text = FENCED.sub("", (ROOT / "README.md").read_text())
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # a link counts by what is read of it
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 900


def commands(page):
    """The commands of `distill` in a page's blocks of shell, in words."""
    for language, block in FENCED.findall(page.read_text()):
        if language in ("", "bash", "sh"):
            for command in COMMAND.findall(block.replace("\\\n", " ")):
                yield shlex.split(command, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_of_pages_are_taken(page):
    for words in commands(page):
        parsed(words)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "extending.md"], **ids)  # test_extending.py
def test_functions_of_pages_exist(page):
    for language, block in FENCED.findall(page.read_text()):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    module = {"distill": distill, "students": students, "teachers": teachers}.get(node.value.id)
                    assert module is None or hasattr(module, node.attr), f"{page.name}: {node.value.id}.{node.attr}"


def test_every_page_has_its_place_in_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w-]+\.md", str(site["nav"]))
    assert len(listed) == len(set(listed))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(listed)
    assert site["strict"] and site["theme"]["font"] is False
