"""The common parts of reports: sections in one self-contained HTML file, for any screen, dark mode and paper."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --line: #d9dee6; --back: #ffffff; --mark: #eaf1ff;
  --c0: #2563c9; --c1: #c2461c; --c2: #1d7d4b; --c3: #8a3fa0; --c4: #8d6100; --c5: #0f7a86; --c6: #7a8391; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #a3adbb; --line: #333c4a; --back: #12161d;
  --mark: #1b2740; --c0: #6aa5ff; --c1: #ff8a5c; --c2: #55c98a; --c3: #cf86e4; --c4: #e0ae3c; --c5: #4fc3d0;
  --c6: #98a2b3; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 62rem;
  margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.note, .missing, figcaption, .legend { color: var(--soft); font-size: .9rem; } .missing { font-style: italic; }
nav { font-size: .9rem; margin-top: .6rem; } nav a { margin-right: .8rem; white-space: nowrap; } a { color: var(--c0); }
.scroll { overflow-x: auto; max-width: 100%; margin-bottom: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
tr.student { background: var(--mark); font-weight: 600; }
table.words td, table.words th { text-align: left; white-space: normal; vertical-align: top; }
table.facts { overflow-wrap: anywhere; } table.words td:last-child { min-width: 12rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem;
  margin-bottom: .8rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .value { fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: .7; } svg .band { fill: var(--mark); }
.legend span { margin-right: .9rem; display: inline-block; } .legend i { display: inline-block; width: 1.1em;
  height: .25em; vertical-align: middle; margin-right: .35em; background: currentColor; }
.legend b { color: var(--soft); font-weight: 400; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; } .pair img { width: 100%; image-rendering: pixelated;
  border: 1px solid var(--line); display: block; background: #fff; }
@media screen and (prefers-color-scheme: dark) { .pair img { filter: invert(1) hue-rotate(180deg); } }
.strip { display: flex; flex-wrap: wrap; gap: 2px; } .strip.line { flex-wrap: nowrap; }
.strip span { flex: none; width: 1.6rem; text-align: center; border-radius: 3px; border: 1px solid currentColor;
  line-height: 1.15; font-size: .8rem; font-weight: 600; }
.strip small { display: block; font-size: .6rem; font-weight: 400; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); }
blockquote { border-left: 3px solid var(--line); margin: .3rem 0 1rem; padding: .1rem 1rem; white-space: pre-wrap; }
code, pre { font-size: .85rem; } pre { white-space: pre-wrap; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --mark: #eee; --c0: #2563c9;
    --c1: #c2461c; --c2: #1d7d4b; --c3: #8a3fa0; --c4: #8d6100; --c5: #0f7a86; --c6: #666; }
  body { margin: 0; max-width: none; font-size: 10pt; } nav { display: none; } .scroll { overflow: visible; }
  table { font-size: 8pt; overflow-wrap: anywhere; }
  table th, table td, table.words td { white-space: normal; padding: .15rem .3rem; min-width: 0 !important; }
  figure, tr, .strip, blockquote { break-inside: avoid; } h2, h3 { break-after: avoid; } * { print-color-adjust: exact; } }
"""


MAKER = "<meta name='generator' content='distill'>"  # in every page
START = "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport'"
HEAD = 512  # bytes at the beginning of a file that show whether it is such a page


@dataclass(frozen=True)
class Section:
    """A section of a page. name: its anchor. body: HTML; if it is empty, `missing` is the reason."""

    name: str
    title: str
    body: str
    missing: str = ""

    def html(self) -> str:
        """The section as HTML; an empty one has a line with the reason."""
        body = self.body or f"<p class='missing'>not run: {text(self.missing)}</p>"
        return f"<section id='{self.name}'><h2>{html.escape(self.title)}</h2>{body}</section>"


def page(title: str, note: str, sections: Sequence[Section]) -> str:
    """The HTML of a page. title and note are plain text; sections hold HTML."""
    links = "".join(f"<a href='#{section.name}'>{html.escape(section.title)}</a> " for section in sections)
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"{MAKER}<link rel='icon' href='data:,'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    body = f"<h1>{html.escape(title)}</h1><p class='note'>{html.escape(note)}</p><nav>{links}</nav>"
    body += "".join(section.html() for section in sections)
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def is_page(head: bytes) -> bool:
    """Whether a file that begins with `head` was made by `page` or is empty."""
    said = head.decode(errors="replace")
    return not head or (said.startswith(START) and MAKER in said)


def text(plain: str) -> str:
    """Convert plain text to HTML; text between backticks becomes code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(plain))


def note(plain: str) -> str:
    """A remark under a title or a figure, as HTML."""
    return f"<p class='note'>{text(plain)}</p>"


def figures(*parts: str) -> str:
    """Figures in a grid that fits the width of the screen."""
    return f"<div class='figures'>{''.join(parts)}</div>"
