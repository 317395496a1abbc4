"""The teacher's licence as its files state it, and what it requires of a student."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.exporters.local_paths import is_local
from teachers.files import folder_of
from teachers.source import resolve

UNKNOWN = "unknown"
OPEN = "keep its notices and the licence's text with every copy"
BINDS = {  # by the start of a licence's id: what to do when the student is passed on
    "apache-2.0": f"use for any purpose; {OPEN}, and say what was changed (this model is: most attention was replaced)",
    "mit": f"use for any purpose; {OPEN}",
    "bsd": f"use for any purpose; {OPEN}",
    "llama": "pass a copy of the licence on with the model, begin the model's name with `Llama`, show `Built with Llama`, "
    "follow its acceptable-use policy, and ask Meta above 700 million monthly users",
    "gemma": "follow its terms and its prohibited-use policy, and pass both on with the student",
    "cc-by-nc": "no commercial use; name the author",
    "cc-by-sa": "name the author, and pass the student on under the same licence",
    "cc-by": "name the author",
    "gpl": "pass the student on under the same licence",
    "agpl": "pass the student on under the same licence, to users over a network too",
    "openrail": "pass its restrictions of use on with the student",
    "bigscience": "pass its restrictions of use on with the student",
    "bigcode": "pass its restrictions of use on with the student",
    "creativeml": "pass its restrictions of use on with the student",
}
# Identifiers that the hub knows (https://huggingface.co/docs/hub/repositories-licenses); any other is named `other`.
KNOWN = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause(-clear)?)?|(llama[234](\.\d)?)|gemma|(a|l)?gpl(-[23]\.[01])?|lgpl-lr|cc0-1\.0|"
    r"cc(-by)?|cc-by(-nc)?(-nd|-sa)?-[234]\.[05]|(bigscience-|creativeml-)?openrail(-m)?|bigscience-bloom-rail-1\.0|"
    r"bigcode-openrail-m|openrail\+\+|mpl-2\.0|unlicense|wtfpl|isc|zlib|epl-[12]\.0|eupl-1\.[12]|cdla-[\w.-]+|odbl|unknown|"
    r"apple-amlr|deepfloyd-if-license|intel-research|h-research|fair-noncommercial-research-license|etalab-2\.0"
)
WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,80}")
LINK = re.compile(r"https?://[\w./%~:#?=&+-]{1,300}|[\w.-]{1,100}")
HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?")
SMALL = 2**20  # the most bytes of a file that are read
SECONDS = 3.0  # how long the hub has to answer


@dataclass(frozen=True)
class Licence:
    """A licence by the hub's id. source: the file that states it. base: the teacher's hub id, where a file states it."""

    id: str
    source: str = ""
    name: str | None = None
    link: str | None = None
    base: str | None = None


def of_teacher(reference: str) -> Licence:
    """Read a teacher's licence from its card, its config or its GGUF header; `unknown` where none of them states it."""
    try:
        found = resolve(reference, allow_pickle=True)
        if found.kind == "gguf":
            return _of_gguf(Path(found.location))
        folder = _with_card(found.location, found.kind)
    except (OSError, ValueError, ImportError):  # the teacher is not on this machine
        folder = None
    return _of_folder(folder) if folder else Licence(UNKNOWN)


def said(found: Licence, teacher: str) -> str:
    """Return the card's section on the teacher and its licence."""
    if found.id == UNKNOWN:
        return (
            f"Teacher: `{teacher}`. Its files do not state its licence. The student is a derivative of the teacher: look up "
            "the teacher's licence before you pass the student on."
        )
    called = found.name or found.id
    binds = next(
        (text for start, text in BINDS.items() if found.id.startswith(start)), "read it; this card has no summary of it"
    )
    return (
        f"Teacher: `{teacher}`, under `{called}` (stated by {found.source}). The student holds weights of the teacher and "
        f"is a derivative of it, so the same licence binds it: {binds}."
    )


def _licence(value: str, source: str, name: str | None = None, link: str | None = None, base: str | None = None) -> Licence:
    """Return a licence by the hub's id; an id that the hub does not know becomes the name of `other`."""
    value = value.lower()
    if value == "other" or not KNOWN.fullmatch(value):
        return Licence("other", source, name or (value if value != "other" else None), link, base)
    return Licence(value, source, base=base)


def _of_folder(folder: Path) -> Licence:
    front = dict(_front_matter(folder / "README.md"))
    if "license" in front:
        return _licence(front["license"], "its card", front.get("license_name"), front.get("license_link"))
    try:
        config = (folder / "config.json").read_text("utf-8")[:SMALL]
    except (OSError, ValueError):
        return Licence(UNKNOWN)
    stated = re.search(r'"license":\s*"([^"]+)"', config)
    return _licence(stated[1], "its config.json") if stated and WORD.fullmatch(stated[1]) else Licence(UNKNOWN)


def _front_matter(card: Path) -> Iterator[tuple[str, str]]:
    """Yield the licence's plain entries in a card's front matter."""
    try:
        with card.open(encoding="utf-8", errors="replace") as opened:
            text = opened.read(SMALL)
    except OSError:
        return
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    for key, value in re.findall(r"^(license(?:_name|_link)?):[ \t]*(.+?)[ \t]*$", front[1] if front else "", re.MULTILINE):
        value = value.strip("'\"")
        if (LINK if key == "license_link" else WORD).fullmatch(value):
            yield key, value


def _with_card(location: str, kind: str) -> Path | None:
    """Return the folder of a teacher's files. A missing card of a teacher on the hub is downloaded if there is a network."""
    folder = folder_of(location)
    if kind != "hub" or (folder and (folder / "README.md").exists()) or is_local(location):
        return folder
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(location, "README.md", etag_timeout=SECONDS)).parent
    except Exception:  # no network or no such repository; HTTP libraries' types differ
        return folder


def _of_gguf(file: Path) -> Licence:
    """Read the licence from a GGUF file's header, or from the card next to the file."""
    from teachers.gguf_header import check_header

    try:
        from gguf import GGUFReader

        check_header(file)
        fields = GGUFReader(file).fields
        text = {name: str(fields[name].contents()) for name in fields if name.startswith("general.")}
    except (ImportError, OSError, ValueError, LookupError, AttributeError):
        return _of_folder(file.parent)
    links = [text.get(name, "") for name in ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url")]
    base = next((match[1] for link in links if (match := HUB.fullmatch(link))), None)
    value = text.get("general.license", "")
    if not WORD.fullmatch(value):
        found = _of_folder(file.parent)
        return Licence(found.id, found.source, found.name, found.link, base)
    name, link = text.get("general.license.name", ""), text.get("general.license.link", "")
    known, page = (name if WORD.fullmatch(name) else None), (link if LINK.fullmatch(link) else None)
    return _licence(value, "its GGUF header", known, page, base)
