"""The table of containers: transformers classes that hold a student exactly, and that other engines read.

To add a container, write a file next to this one with a `Container`, and add a line to `CONTAINERS`.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.exporters.containers.container import Container
    from distill.exporters.source import Source

CONTAINERS: dict[str, str] = {
    "GraniteMoeHybrid": "distill.exporters.containers.granite:GraniteMoeHybrid",
    "Qwen3.5": "distill.exporters.containers.qwen35:Qwen35",
    "Falcon-H1": "distill.exporters.containers.falcon_h1:FalconH1",
}


@dataclass(frozen=True)
class Fitting:
    """The container that holds a student, or None, and why each container tried before it does not, by name."""

    container: "Container | None"
    reasons: dict[str, list[str]] = field(default_factory=dict)


def container_of(name: str) -> "Container":
    """Return the container of that name."""
    module, _, attribute = CONTAINERS[name].partition(":")
    return getattr(import_module(module), attribute)()


def fitting(source: "Source") -> Fitting:
    """Find the first container of the table that holds a student."""
    reasons = {}
    for name in CONTAINERS:
        container = container_of(name)
        reasons[name] = container.reasons(source)
        if not reasons[name]:
            return Fitting(container, {other: why for other, why in reasons.items() if why})
    return Fitting(None, reasons)
