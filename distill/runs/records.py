"""What each file of a run folder holds: the schemas that it is read by, and what to do about one that is damaged.

They say what is read back. Entries that they do not name are kept as they are: later versions write more.
"""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Whole = Annotated[int, Field(ge=0)]
Numbers = dict[str, float]


class Record(BaseModel):
    """Base of the schemas of what we write: no guessed types, finite numbers, further entries let through."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Part(Record):
    """A part of a run's end that was made: of which state of the student, and its files in the run folder."""

    of: str
    files: list[str] = []


class MicroBatch(Record):
    """How many windows at a time were found to fit, on which device, with how many processes."""

    windows: Annotated[int, Field(ge=1)]
    device: str
    processes: Whole


class Begun(Record):
    """The student that a run starts from, and the hash of its weights."""

    reference: str
    sha256: str


class Facts(Record):
    """run.json."""

    ended: dict[str, Part] = {}
    taught: dict[str, str] = {}
    micro_batches: dict[str, MicroBatch] = {}
    student: Begun | None = None

    format: int = 1
    versions: dict[str, str] = {}
    teacher: str | None = None
    train_text: str | None = None
    heldout_text: str | None = None
    types: list[str] = []  # of the teacher and of the products, of every process that took part
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
    """evaluations.json; `distill.evaluation.records` says what its entries hold."""

    identity: dict[str, Any] | None = None
    untrained: dict[str, Any] | None = None
    quantised: Numbers | None = None
    after: dict[str, dict[str, Any]] = {}
    final: dict[str, Any] | None = None
    suites: dict[str, dict[str, Any]] = {}


class Samples(Record):
    """samples.json."""

    prompt: str
    teacher: str
    student: str


class Transfers(Record):
    """transfer.json."""

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
    """What a selection measured of a whole model."""

    recalled: float
    choice: float
    kl: float


class Models(Record):
    """The models that a selection ends with."""

    teacher: Model
    chosen: Model
    even: Model
    free: Model | None = None


class Cost(Record):
    """What a selection took."""

    tokens: Whole
    seconds: float
    predicted_seconds: float


class Periodic(Record):
    """Attention in every n-th layer, against a free choice."""

    every: Whole
    score: float | None
    free: list[Whole]
    free_score: float | None


class Scored(Record):
    """What a scorer was given; the rest of it is its own."""

    families: list[str] = []
    names: list[str] = []


class Chosen(Record):
    """What a selection chose."""

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
    """What learning gates took."""

    tokens: Whole
    seconds: float


class Gates(Record):
    """What learning gates has come to."""

    logits: list[float]
    first: list[float]
    second: list[float]
    multiplier: float
    step: Whole


class Selection(Record):
    """selection.json."""

    facts: dict[str, str] = {}
    measured: dict[str, dict[str, Measurement]] = {}
    trained: Trained | None = None
    gates: Gates | None = None
    chosen: Chosen | None = None


class Row(Record):
    """row.json, of a benchmark of layouts."""

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
    "evaluations.json": (TypeAdapter(Evaluations), "delete it, and the same `distill run` judges again"),
    "selection.json": (TypeAdapter(Selection), "delete it to have it measured again"),
    "transfer.json": (TypeAdapter(Transfers), "delete it, or start again with --fresh"),
    "samples.json": (TypeAdapter(Samples), "delete it, and the same `distill run` makes it again"),
    "row.json": (TypeAdapter(Row), AGAIN),
}
STEP = TypeAdapter(Step)
OF_A_STAGE = re.compile(r"selection-\d+-\w+\.json")  # of layers that a stage converts


def schema_of(name: str) -> tuple[TypeAdapter, str]:
    """What a file of a run folder holds, and the fix where it does not."""
    return SCHEMAS["selection.json" if OF_A_STAGE.fullmatch(name) else name]
