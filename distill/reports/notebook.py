"""Figures of a report in a notebook, independent of the notebook's own style."""

import html

from distill.reports.page import STYLE


class Shown:
    """HTML that a notebook displays in its own frame when it is the value of a cell."""

    def __init__(self, body: str, height: int = 340) -> None:
        """body: figures, tables, or a whole page. height: of the frame, in CSS pixels."""
        self.body, self.height = body, height

    def _repr_html_(self) -> str:
        page = self.body if self.body.startswith("<!doctype") else f"<!doctype html><style>{STYLE}</style>{self.body}"
        frame = f"width: 100%; height: {self.height}px; border: 0"
        return f"<iframe srcdoc='{html.escape(page, quote=True)}' style='{frame}'></iframe>"
