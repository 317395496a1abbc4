"""The schemas of the evaluations' results. Results are checked when they are read back, before tables are made of them.

Entries that earlier versions did not write (documents, paired differences) may be missing; entries that exist are checked.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from distill.evaluation.fidelity_records import Count, Fidelity
from distill.evaluation.rows import TITLES
from distill.runs.records import Numbers, Record, Whole

Length = Annotated[int, Field(ge=1)]
if TYPE_CHECKING:
    Row = str
else:
    Row = Literal[tuple(TITLES)]


class Passkey(Record):
    """Passkey recall at one length."""

    length: Length
    recalled: Whole
    trials: Count


class Recall(Passkey):
    """One cell of a recall family."""

    score: float
    depth: float | None = None


class Task(Record):
    """A task's result, or why it has none."""

    not_run: str | None = None
    metric: str | None = None
    score: float | None = None
    error: float | None = None
    chance: float | None = None
    items: Count | None = None
    correct: Annotated[str, Field(pattern="^[01]*$")] | None = None

    @model_validator(mode="after")
    def _whole(self):
        if (self.score is None) == (self.not_run is None):
            raise ValueError("it should have either a score or the reason why it was not run")
        if self.score is not None and None in (self.metric, self.chance, self.items):
            raise ValueError("it has a score, so it should have a metric, a chance and a number of items")
        return self


class Cell(Record):
    """Speed at a length and batch, or why there is none."""

    length: Length
    batch: Count
    not_run: str | None = None
    first_token_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    graph_decode_tokens_per_second: float | None = None
    peak_bytes: float | None = None
    cache_bytes: float | None = None


class Speed(Record):
    """Speed of a row."""

    device: str
    method: str
    cells: list[Cell]


class Results(Record):
    """A row's results; results of evaluations that are not named here are not checked."""

    fidelity: Fidelity
    passkey: list[Passkey] = []
    recall: dict[str, list[Recall]] = {}
    tasks: dict[str, Task] = {}
    speed: Speed | None = None


class Rows(Record):
    """The rows that every judgement has."""

    teacher: Results
    student: Results


class Difference(Record):
    """A paired difference, see `pairing.paired`."""

    difference: float
    error: float | None
    lower: Whole
    documents: Whole


class AgainstStudent(Record):
    """The student's fidelity less a row's; empty if the two were judged on different documents."""

    kl: Difference | None = None
    nll: Difference | None = None
    agreement: Difference | None = None

    @model_validator(mode="after")
    def _whole(self):
        if len({value is None for value in (self.kl, self.nll, self.agreement)}) != 1:
            raise ValueError("it should have kl, nll and agreement, or none of them")
        return self


class Share(Record):
    """Recall as a share of the teacher's recall."""

    length: Length
    depth: float | None = None
    share: float | None


class Recovery(Record):
    """The result of `comparison.recovery`."""

    score: float | None
    error: float | None = None
    tasks: list[str] = []

    @model_validator(mode="after")
    def _both(self):
        if (self.score is None) != (self.error is None):
            raise ValueError("it should have a score with its error, or neither")
        return self


class Crossover(Record):
    """The lengths from which on a row is faster than the teacher, for one batch."""

    batch: Count
    first_token: Length | None = None
    decode: Length | None = None
    graph_decode: Length | None = None


class Wins(Record):
    """A task against the teacher, see `comparison.wins_and_ties`."""

    win: float
    tie: float
    win_or_tie: float
    difference: float
    difference_error: float | None


class AgainstTeacher(Record):
    """A row's comparison with the teacher, where both were measured."""

    passkey: list[Share] | None = None
    recall: dict[str, list[Share]] | None = None
    tasks: dict[str, Wins] | None = None
    recovery: Recovery | None = None
    speed: list[Crossover] | None = None


class LeftOut(Record):
    """A part of a suite that was not run, and why."""

    rows: list[str]
    evaluation: str
    part: str
    reason: str


class InSample(Record):
    """The recall families and tasks that selected the layout."""

    families: list[str] = []
    tasks: list[str] = []


class Overlap(Record):
    """Held-out text that is training text, see `distill.text.overlap`."""

    documents: Whole
    exact: Whole
    exact_tokens: float
    sampled: Whole
    near: Whole
    runs: float
    searched: Whole


class Judgement(Record):
    """The judgement that `distill.evaluate` returns."""

    teacher: str = ""
    target: str | None = None
    suite: str
    device: str
    precision: str
    pattern: Annotated[str, Field(pattern="^[A-Z]+$")]
    rows: dict[Row, Results]
    against_teacher: dict[Row, AgainstTeacher]
    against_student: dict[Row, AgainstStudent] = {}
    chance: Numbers
    in_sample: InSample = InSample()
    layers: dict[Annotated[str, Field(pattern=r"^(.*_)?\d{1,6}$")], float]
    overlap: Overlap | None = None
    not_run: list[LeftOut]
    seconds: dict[str, Numbers] = {}

    @model_validator(mode="after")
    def _both_ends(self):
        if missing := {"teacher", "student"} - set(self.rows):
            raise ValueError(f"its rows should have the {' and the '.join(sorted(missing))}")
        teacher = self.rows["teacher"]
        for row, results in self.rows.items():
            beside = self.against_teacher.get(row) or AgainstTeacher()
            asked = {len(cells) for cells in (results.passkey, teacher.passkey, beside.passkey) if cells}
            if len(asked) > 1:
                raise ValueError(f"the {row} should have as many lengths of passkeys as the teacher")
            timed = results.speed and teacher.speed and len(results.speed.cells) != len(teacher.speed.cells)
            missing = {family for family in teacher.recall if results.recall and not results.recall.get(family)}
            if timed or missing:
                raise ValueError(f"the {row} should have as many cells of speed and recall as the teacher")
        return self


class Unchanged(Record):
    """How far a student differs from itself before further layers were converted, see `identity.check_replaced`."""

    logits: float
    layers: Numbers


class After(Record):
    """What was measured after a stage: its own loss, and fidelity if it was asked for.

    A stage that converted further layers also has these layers, the new layout, and what else of the student changed.
    """

    probe: Numbers
    seconds: float
    converted: list[Whole] | None = None
    pattern: Annotated[str, Field(pattern="^[A-Z]+$")] | None = None
    identity: Unchanged | None = None
