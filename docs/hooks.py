"""What MkDocs runs while it builds the site: repository files outside docs/ become pages, and links to them work.

A link is written as it works in the repository, relative to the file that it stands in. The site has the pages in another
place, so each link to a file of the repository is turned into a link to that file's page. A file that is no page, a notebook
for one, is published as it is.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "recipes/text/LICENSE.md": "text-licence.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
SOURCES = {uri: source for source, uri in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^()\s#:]+)(?=(#[^()\s]*)?\))")


def on_files(files, config):
    """Add the pages that lie outside docs/, and the files that pages link to."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            place = _place(page.src_uri, link[0])
            if place and place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages of the site."""

    def turned(link):
        place = _place(page.file.src_uri, link[1])
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".") if place else link[1]

    return LINK.sub(turned, markdown).replace(" ± ", "\u00a0±\u00a0")  # numbers keep their errors on their line


def _place(uri: str, target: str) -> str | None:
    """Where in the site a link leads; None where it names no file of the repository, which MkDocs then reports.

    uri: the page that it stands on. target: what is linked, relative to that page's file.
    """
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))
    path = posixpath.normpath(posixpath.join(folder, target))
    if not (ROOT / path).is_file():
        return None
    return PAGES.get(path) or path.removeprefix("docs/")
