"""native: a folder that transformers' own classes load without any code of ours, and that vLLM and MLX serve."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from distill.exporters.containers import fitting
from distill.exporters.engines import ENGINES
from distill.exporters.target import Form, Target

if TYPE_CHECKING:
    from distill.exporters.source import Source


class Native(Target):
    """A class of transformers' own, where one is the same function as the student."""

    line = "a folder for a class that transformers has itself, which vLLM and MLX serve; refused where none is exact"

    def refuses(self, source: "Source") -> str | None:
        found = fitting(source)
        if found.container:
            return None
        return "; ".join(f"{name}: {', '.join(why)}" for name, why in found.reasons.items()) or "no container is known"

    def since(self, source: "Source") -> str | None:
        container = fitting(source).container
        return None if container is None else container.since(source)

    def engines(self, source: "Source") -> dict[str, str | None]:
        container = fitting(source).container
        return dict.fromkeys(ENGINES, "no container") if container is None else container.engines(source)

    def write(self, student: Path, out: Path, form: Form) -> None:
        raise NotImplementedError(json, student, out, form)
