"""The licence of a teacher, where its own files say it, and what it binds a student to."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.exporters.local_paths import is_local
from teachers.files import folder_of
from teachers.source import resolve

UNKNOWN = "unknown"
OPEN = "keep its notices and the licence's text with every copy"
BINDS = {  # by how an id begins: what whoever passes the student on has to do
    "apache-2.0": f"use for any purpose; {OPEN}, and say what was changed (this model is: most attention was replaced)",
    "mit": f"use for any purpose; {OPEN}",
    "bsd": f"use for any purpose; {OPEN}",
    "llama": "a copy of the licence goes with the model, its name begins with `Llama`, `Built with Llama` is shown, its "
    "acceptable-use policy binds, and above 700 million monthly users Meta must be asked",
    "gemma": "its terms and its prohibited-use policy bind whoever gets the student, and are passed on with it",
    "cc-by-nc": "no commercial use; the author is named",
    "cc-by-sa": "the author is named, and the student is passed on under the same licence",
    "cc-by": "the author is named",
    "gpl": "the student is passed on under the same licence",
    "agpl": "the student is passed on under the same licence, to users over a network too",
    "openrail": "its restrictions of use are passed on with the student",
    "bigscience": "its restrictions of use are passed on with the student",
    "bigcode": "its restrictions of use are passed on with the student",
    "creativeml": "its restrictions of use are passed on with the student",
}
# Identifiers that the hub knows (https://huggingface.co/docs/hub/repositories-licenses); anything else is `other`, by name.
KNOWN = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause(-clear)?)?|(llama[234](\.\d)?)|gemma|(a|l)?gpl(-[23]\.[01])?|lgpl-lr|cc0-1\.0|"
    r"cc(-by)?|cc-by(-nc)?(-nd|-sa)?-[234]\.[05]|(bigscience-|creativeml-)?openrail(-m)?|bigscience-bloom-rail-1\.0|"
    r"bigcode-openrail-m|openrail\+\+|mpl-2\.0|unlicense|wtfpl|isc|zlib|epl-[12]\.0|eupl-1\.[12]|cdla-[\w.-]+|odbl|unknown|"
    r"apple-amlr|deepfloyd-if-license|intel-research|h-research|fair-noncommercial-research-license|etalab-2\.0"
)
WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,80}")
LINK = re.compile(r"https?://[\w./%~:#?=&+-]{1,300}|[\w.-]{1,100}")
HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?")
SMALL = 2**20  # bytes of a card that are read
SECONDS = 3.0  # that the hub has to answer


@dataclass(frozen=True)
class Licence:
    """A licence as the hub writes it. source: what said so. base: the teacher's own id on the hub, where a file says it."""

    id: str
    source: str = ""
    name: str | None = None
    link: str | None = None
    base: str | None = None


def of_teacher(reference: str) -> Licence:
    """The licence of a teacher by its card, its config or its GGUF header; `unknown` where none of them says it."""
    try:
        found = resolve(reference, allow_pickle=True)
        if found.kind == "gguf":
            return _of_gguf(Path(found.location))
        folder = _with_card(found.location, found.kind)
    except (OSError, ValueError, ImportError):  # it has moved, or never was here
        folder = None
    return _of_folder(folder) if folder else Licence(UNKNOWN)


def said(found: Licence, teacher: str) -> str:
    """The section of the card."""
    if found.id == UNKNOWN:
        return (
            f"Teacher: `{teacher}`. Its files here do not say its licence. The student is a derivative of it: look the "
            "licence up where the teacher comes from before you pass this on."
        )
    called = found.name or found.id
    binds = next(
        (text for start, text in BINDS.items() if found.id.startswith(start)), "read it: this card does not know it"
    )
    return (
        f"Teacher: `{teacher}`, under `{called}` (said by {found.source}). The student holds weights of the teacher and is "
        f"a derivative of it, so the same licence binds it: {binds}."
    )


def _licence(value: str, source: str, name: str | None = None, link: str | None = None, base: str | None = None) -> Licence:
    """As the hub has it: one that it does not know is `other`, by its name."""
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
    """The plain entries on the licence in a card's front matter."""
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
    """Where a teacher's files lie; the card of one on the hub is asked for, where there is a network."""
    folder = folder_of(location)
    if kind != "hub" or (folder and (folder / "README.md").exists()) or is_local(location):
        return folder
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(location, "README.md", etag_timeout=SECONDS)).parent
    except Exception:  # no network, no such repository: of HTTP libraries, whose types differ
        return folder


def _of_gguf(file: Path) -> Licence:
    """By the header of a GGUF file, and by the card beside it."""
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
