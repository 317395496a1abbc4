"""What an export target is: it says what it makes and what it refuses, and writes one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from distill.exporters.source import Source


@dataclass(frozen=True)
class Form:
    """How the weights are written.

    dtype: of all weights but those that must stay in float32. quantize: a type of llama.cpp, for targets that have them.
    quantiser: the Python whose llama.cpp quantises; None looks for one.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: str | None = None
    quantiser: str | None = None


class Target:
    """Base of the export targets.

    Modules of targets are imported for `--help`: whatever is heavy is imported where it is used.

    line: what the target makes, in one line for `--help`. quantizations: what `Form.quantize` may be.
    remote_code: whether what it writes brings code along, which `trust_remote_code` lets transformers run.
    """

    line: ClassVar[str]
    quantizations: ClassVar[tuple[str, ...]] = ()
    remote_code: ClassVar[bool] = False

    def refuses(self, source: "Source") -> str | None:
        """Why it cannot hold such a student, naming what would have to change; None where it can."""
        return None

    def since(self, source: "Source") -> str | None:
        """The first version of transformers in which what it writes is the student; None for every supported one."""
        return None

    def engines(self, source: "Source") -> dict[str, str | None]:
        """For each engine of `exporters.engines.ENGINES`, why it does not run what the target writes; None where it does."""
        raise NotImplementedError

    def types(self, form: Form) -> str:
        """The type of the weights that are written, as people call it."""
        return form.dtype

    def check_installed(self) -> None:
        """Refuse where a package that writes it is not installed.

        Raises:
            UserError: with the command that installs it.
        """

    def write(self, student: Path, out: Path, form: Form) -> None:
        """Write a student in the target's form.

        Args:
            student: the folder of a finished student. out: the folder to make.

        Raises:
            OSError: it cannot be written. ValueError: the student's files do not fit each other.
        """
        raise NotImplementedError

    def rehearse(self, student: Path, out: Path, form: Form) -> None:
        """Try, before anything is trained, what `write` will do: on a folder that is whole but for its weights, of which one
        tensor is there. What is written is thrown away.

        Raises:
            OSError, ValueError: as `write`.
        """
        self.write(student, out, form)
