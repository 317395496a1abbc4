"""The base class of the export targets: a target refuses students that it cannot hold, and writes the others as a folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from distill.exporters.engines import Preparation

if TYPE_CHECKING:
    from distill.exporters.source import Source


@dataclass(frozen=True)
class Form:
    """The types in which the weights are written.

    dtype: of all weights but those that must stay in float32. quantize: a quantised type of llama.cpp, for targets that have
    them. quantiser: the Python whose llama.cpp quantises; None looks for one.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: str | None = None
    quantiser: str | None = None


class Target:
    """Base class of the export targets.

    `--help` imports the modules of all targets, so heavy packages are imported inside functions.

    line: what the target makes, in one line for `--help`. quantizations: the values that `Form.quantize` may have.
    remote_code: whether the export contains code, which transformers runs only with `trust_remote_code`.
    """

    line: ClassVar[str]
    quantizations: ClassVar[tuple[str, ...]] = ()
    remote_code: ClassVar[bool] = False

    def refuses(self, source: "Source") -> str | None:
        """Return why the target cannot hold the student and what would have to change; None if it can hold it."""
        return None

    def since(self, source: "Source") -> str | None:
        """Return the first transformers version that computes the export exactly; None if every supported one does."""
        return None

    def engines(self, source: "Source") -> dict[str, str | None]:
        """Return, for each engine of `exporters.engines.ENGINES`, why it does not run the export; None if it does."""
        raise NotImplementedError

    def preparations(self, source: "Source") -> Mapping[str, Preparation]:
        """Return, by engine, what its environment needs before it runs the export."""
        return {}

    def types(self, form: Form) -> str:
        """Return the name of the type in which the weights are written."""
        return form.dtype

    def check_installed(self) -> None:
        """Check that the packages that write the export are installed.

        Raises:
            UserError: with the command that installs the missing one.
        """

    def write(self, student: Path, out: Path, form: Form) -> None:
        """Write a student in the target's form.

        Args:
            student: the folder of a finished student. out: the folder to make.

        Raises:
            OSError: the folder cannot be written. ValueError: the student's files do not fit each other.
        """
        raise NotImplementedError

    def rehearse(self, student: Path, out: Path, form: Form) -> None:
        """Try what `write` will do, before anything is trained. The caller deletes the result.

        The student's folder is complete except for its weights, which are one tensor.

        Raises:
            OSError, ValueError: as `write`.
        """
        self.write(student, out, form)
