"""What an export target is: it says what it makes and what it refuses, and writes one folder."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from students.config import Layout


class Target:
    """Base of the export targets.

    Modules of targets are imported for `--help`: whatever is heavy is imported where it is used.

    line: what the target makes, in one line for `--help`.
    """

    line: ClassVar[str]

    def refuses(self, layout: "Layout", family: str) -> str | None:
        """Why it cannot hold a student of this layout, naming what would have to change; None where it can.

        Args:
            family: the teacher's model_type.
        """
        return None

    def write(self, student: Path, out: Path) -> None:
        """Write a student in the target's form.

        Args:
            student: the folder of a finished student. out: the folder to make.

        Raises:
            OSError: it cannot be written.
        """
        raise NotImplementedError
