"""What an evaluation is: it measures one model at a time, and says which suites run it and what of its results is shown."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from rich.table import Table

from distill.evaluation.suite import Suite
from distill.text.heldout import Heldout
from students.skeleton import Student
from teachers.teacher import Teacher


class Evaluation:
    """Base of the evaluations.

    suites: names of the suites that run it for the teacher and the student ("run" is what ends a run). baselines, knockouts:
    those of them that run it for the baselines, and for the student without one of its branches, too.
    """

    suites: ClassVar[tuple[str, ...]]
    baselines: ClassVar[tuple[str, ...]] = ()
    knockouts: ClassVar[tuple[str, ...]] = ()

    def measure(self, teacher: Teacher, model: Student | None, heldout: Heldout, suite: Suite) -> Any:
        """One model's results, as JSON will hold them; `model` None asks the teacher."""
        raise NotImplementedError

    def divides(self, suite: Suite) -> bool:
        """Whether several processes may measure one model together; without, the first one does it alone."""
        return True

    def beside(self, own: Any, teacher: Any) -> dict[str, Any]:
        """What a row's results are beside the teacher's, for `against_teacher`, by name."""
        return {}

    def chance(self, results: Any) -> dict[str, float]:
        """The scores that guessing has, by what is scored; of what guessing scores 0 in, nothing."""
        return {}

    def left_out(self, results: Any) -> Iterator[tuple[str, str]]:
        """What of the suite has no result, by part, and why."""
        yield from ()

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        """Titles and tables that show a judgement's results (see `distill.evaluation`)."""
        yield from ()
