"""evaluations.json as it is read back: what each evaluation's results are, so that tables never meet anything else.

What earlier versions did not write (documents, paired differences) may be missing; what is there has its type.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from distill.errors import UserError
from distill.evaluation.rows import TITLES
from distill.reading import Unreadable, checked
from distill.runs.records import SCHEMAS, Numbers, Record, Whole
from distill.runs.run_dir import RunDir

FILE = "evaluations.json"
JUDGEMENT = {"suite", "device", "precision", "pattern", "rows", "against_teacher", "chance", "layers", "not_run"}
Length, Count = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
Row = Literal[tuple(TITLES)]


class Part(Record):
    """Fidelity in a part of the text."""

    name: str
    tokens: Whole
    kl: float
    agreement: float


class Band(Part):
    """A part of the window; its name is the first and the last token of it."""

    name: Annotated[str, Field(pattern=r"^\d{1,9}-\d{1,9}$")]


class Documents(Record):
    """Fidelity document by document."""

    number: list[int]
    tokens: list[Count]
    kl: list[float]
    nll: list[float]
    agreement: list[float]

    @model_validator(mode="after")
    def _alike(self):
        if len({len(values) for values in vars(self).values()}) != 1:
            raise ValueError("its lists should be of one length")
        return self


class Fidelity(Record):
    """Results of `fidelity`."""

    tokens: Whole
    kl: float
    kl_error: float | None = None
    agreement: float
    nll: float = 0.0
    teacher_nll: float = 0.0
    perplexity: float | None
    teacher_perplexity: float | None = None
    ece: float = 0.0
    rank: float = 0.0
    overlap: float = 0.0
    kendall: float = 0.0
    documents: Documents | None = None
    by_position: list[Band] = []
    by_source: list[Part] = []


class Passkey(Record):
    """Passkeys of a length."""

    length: Length
    recalled: Whole
    trials: Count


class Recall(Passkey):
    """A cell of a family."""

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
            raise ValueError("it should have a metric, a chance and a number of items beside its score")
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
    """A row's results; those of evaluations that are not named here are their own business."""

    fidelity: Fidelity
    passkey: list[Passkey] = []
    recall: dict[str, list[Recall]] = {}
    tasks: dict[str, Task] = {}
    speed: Speed | None = None


class Rows(Record):
    """The rows of a judgement: no table can be without its two ends."""

    teacher: Results
    student: Results


class LeftOut(Record):
    """What was not run, and why."""

    rows: list[str]
    evaluation: str
    part: str
    reason: str


class InSample(Record):
    """What selected the layout."""

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
    """What `distill.evaluate` returns."""

    teacher: str = ""
    target: str | None = None
    suite: str
    device: str
    precision: str
    pattern: Annotated[str, Field(pattern="^[A-Z]+$")]
    rows: dict[Row, Results]
    against_teacher: dict[Row, dict[str, Any]]
    against_student: dict[Row, dict[str, dict[str, float | None]]] = {}
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
        return self


class After(Record):
    """What was measured after a stage: its own loss, and fidelity where it was asked for."""

    probe: Numbers
    seconds: float


JUDGED, FIDELITY, AFTER = TypeAdapter(Judgement), TypeAdapter(Fidelity), TypeAdapter(After)
STAGE = re.compile(r"\d{1,6}-\w+")


def evaluations_of(folder: RunDir) -> dict:
    """Every evaluation of a run so far, each as its schema says.

    Raises:
        UserError: the file is damaged, or another version wrote it.
    """
    content = folder.read(FILE, {})
    try:
        _check(content, folder.path)
    except Unreadable as error:
        raise UserError(f"{folder.path / FILE} is damaged ({error}); {SCHEMAS[FILE][1]}") from error
    return content


def _check(content: Mapping, folder: Any) -> None:
    if content.get("untrained") is not None:
        _of("untrained", content["untrained"], FIDELITY)
    for stage, measured in content.get("after", {}).items():
        if not STAGE.fullmatch(stage):
            raise Unreadable(f"after.{stage} is no stage's name")
        _of(f"after.{stage}", measured, AFTER)
        if "kl" in measured:
            _of(f"after.{stage}", measured, FIDELITY)
    for name, judged in {"final": content.get("final"), **content.get("suites", {})}.items():
        if judged is None:
            continue
        if missing := sorted(JUDGEMENT - set(judged)):
            raise UserError(
                f"{folder / FILE}: {name} lacks {', '.join(missing)}: another version of distill wrote it; use that one, "
                "or run again with --fresh"
            )
        _of(name, judged, JUDGED)


def _of(place: str, content: Any, schema: TypeAdapter) -> None:
    try:
        checked(content, schema)
    except Unreadable as error:
        raise Unreadable(f"{place}.{error}") from error
