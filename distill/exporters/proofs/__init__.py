"""What was seen of an export in the engines that are to run it, before it takes its final name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from distill.exporters.source import Source
    from distill.exporters.target import Form, Target


@dataclass(frozen=True)
class Proof:
    """One engine and one export.

    state: proved; absent (it is not installed); cannot (`why` says what of this student it does not run).
    version: the engine's. numbers: what was measured, by name: largest differences, equal tokens, divergences.
    """

    engine: str
    state: Literal["proved", "absent", "cannot"]
    why: str = ""
    version: str | None = None
    numbers: dict[str, float | int | str] = field(default_factory=dict)


def prove(
    student: Path,
    written: Path,
    target: "Target",
    source: "Source",
    form: "Form",
    *,
    pythons: Mapping[str, str],
    say: Callable[[str], None],
) -> list[Proof]:
    """Run an export in every engine that is to run it and is installed, each in a fresh process, against the student.

    Args:
        student: the finished student's folder. written: the export, under its scratch name.
        pythons: engines that live in an environment of their own, with its Python. say: told what is being proved.

    Raises:
        UserError: the first difference found, with the engine and both values.
    """
    return []
