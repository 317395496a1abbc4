"""Schemas of the JSON files of a run folder, and the fix for each file when it is damaged.

A schema names the entries that are read. Other entries are kept unchanged, because later versions may write more.
"""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Whole = Annotated[int, Field(ge=0)]
Numbers = dict[str, float]


class Record(BaseModel):
    """Base class of the schemas of files that we write: strict types, finite numbers, further entries allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Part(Record):
    """A finished part of a run's end. of: the student's state that it belongs to. files: its files in the run folder."""

    of: str
    files: list[str] = []


class MicroBatch(Record):
    """The micro-batch that was found to fit, with the device and the number of processes."""

    windows: Annotated[int, Field(ge=1)]
    device: str
    processes: Whole


class Begun(Record):
    """The student that a run starts from, and the hash of its weights."""

    reference: str
    sha256: str


class Facts(Record):
    """The content of run.json."""

    ended: dict[str, Part] = {}
    taught: dict[str, str] = {}
    micro_batches: dict[str, MicroBatch] = {}
    student: Begun | None = None

    format: int = 1
    versions: dict[str, str] = {}
    teacher: str | None = None
    train_text: str | None = None
    heldout_text: str | None = None
    types: list[str] = []  # the types of teacher and products, one entry each time that they changed
    stage_texts: dict[str, str] = {}
    stopped: str | None = None
    finished: bool = False


class Step(Record):
    """A line of metrics.jsonl."""

    stage_index: int
    stage: str
    step: Whole
    loss: float
    tokens_per_second: float | None = None


class Evaluations(Record):
    """The content of evaluations.json; `distill.evaluation.records` has the schemas of its entries."""

    identity: dict[str, Any] | None = None
    untrained: dict[str, Any] | None = None
    quantised: Numbers | None = None
    after: dict[str, dict[str, Any]] = {}
    final: dict[str, Any] | None = None
    suites: dict[str, dict[str, Any]] = {}


class Samples(Record):
    """An entry of samples.json."""

    prompt: str
    teacher: str
    student: str


class Transfers(Record):
    """The content of transfer.json."""

    teacher: str
    sources: dict[str, str]
    unused: list[str]
    ignored: list[str] = []


class Entry(Record):
    """A line of a selection's ranking."""

    name: str
    score: float | None
    numbers: Numbers
    kept: bool


class Model(Record):
    """A selection's measurements of a whole model."""

    recalled: float
    choice: float
    kl: float


class Models(Record):
    """The models that a selection compares at its end."""

    teacher: Model
    chosen: Model
    even: Model
    free: Model | None = None


class Cost(Record):
    """The cost of a selection."""

    tokens: Whole
    seconds: float
    predicted_seconds: float


class Periodic(Record):
    """A periodic choice (attention in every n-th layer) and the free choice that it is compared with."""

    every: Whole
    score: float | None
    free: list[Whole]
    free_score: float | None


class Scored(Record):
    """A scorer's options that are read by others; it may have further ones."""

    families: list[str] = []
    names: list[str] = []


class Chosen(Record):
    """The result of a selection."""

    by: str
    options: Scored
    pattern: Annotated[str, Field(min_length=1, pattern="^[A-Z]+$")]
    mixers: dict[str, dict[str, Any]]
    layers: list[Whole]
    heads: dict[str, list[Whole]] | None
    ranking: list[Entry]
    models: Models
    cost: Cost
    note: str
    periodic: Periodic | None = None


class Measurement(Record):
    """One measurement of a selection; its other entries are numbers too."""

    tokens: Whole
    seconds: float

    __pydantic_extra__: dict[str, float]


class Trained(Record):
    """The cost of learning gates."""

    tokens: Whole
    seconds: float


class Gates(Record):
    """The state of learning gates (`distill.selection.gates.GateState`)."""

    logits: list[float]
    first: list[float]
    second: list[float]
    multiplier: float
    step: Whole


class Selection(Record):
    """The content of selection.json."""

    facts: dict[str, str] = {}
    measured: dict[str, dict[str, Measurement]] = {}
    trained: Trained | None = None
    gates: Gates | None = None
    chosen: Chosen | None = None


class Row(Record):
    """The content of row.json: one row of a benchmark of layouts."""

    device: str
    pattern: str
    kl: float
    kl_error: float | None
    agreement: float
    perplexity: float | None
    passkey: dict[str, str]
    cache_bytes: float
    tokens_per_second: Numbers
    seconds: float


AGAIN = "delete it to have it made again"
SCHEMAS: dict[str, tuple[TypeAdapter, str]] = {
    "run.json": (TypeAdapter(Facts), AGAIN),
    "evaluations.json": (TypeAdapter(Evaluations), "delete it, and the same `distill run` evaluates again"),
    "selection.json": (TypeAdapter(Selection), "delete it to have it measured again"),
    "transfer.json": (TypeAdapter(Transfers), "delete it, or start again with --fresh"),
    "samples.json": (TypeAdapter(Samples), "delete it, and the same `distill run` makes it again"),
    "row.json": (TypeAdapter(Row), AGAIN),
}
STEP = TypeAdapter(Step)
OF_A_STAGE = re.compile(r"selection-\d+-\w+\.json")  # the selection of a stage that converts further layers


def schema_of(name: str) -> tuple[TypeAdapter, str]:
    """The schema of a file of a run folder, and the fix when the file is damaged."""
    return SCHEMAS["selection.json" if OF_A_STAGE.fullmatch(name) else name]
