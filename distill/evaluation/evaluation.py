"""The base class of evaluations: an evaluation measures one model at a time, and makes tables of the results."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from rich.table import Table

from distill.evaluation.suite import Suite
from distill.text.heldout import Heldout
from students.skeleton import Student
from teachers.teacher import Teacher


class Evaluation:
    """Base class of the evaluations.

    suites: the suites that run it for the teacher and the student ("run" is the one that ends a run). baselines, knockouts:
    those of these suites that also run it for the baselines, and for the student without one of its branches.
    """

    suites: ClassVar[tuple[str, ...]]
    baselines: ClassVar[tuple[str, ...]] = ()
    knockouts: ClassVar[tuple[str, ...]] = ()

    def measure(self, teacher: Teacher, model: Student | None, heldout: Heldout, suite: Suite) -> Any:
        """Return one model's results as JSON values. model: None measures the teacher."""
        raise NotImplementedError

    def divides(self, suite: Suite) -> bool:
        """Whether several processes measure one model together; if not, the first one does it alone."""
        return True

    def beside(self, own: Any, teacher: Any) -> dict[str, Any]:
        """Compare a row's results with the teacher's, for `against_teacher`; comparisons by name."""
        return {}

    def chance(self, results: Any) -> dict[str, float]:
        """Return the scores of guessing by the name of what is scored; a score of 0 is left out."""
        return {}

    def left_out(self, results: Any) -> Iterator[tuple[str, str]]:
        """Yield the parts of the suite without a result, each with the reason."""
        yield from ()

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        """Yield titles and tables of a judgement's results (see `distill.evaluation`)."""
        yield from ()
