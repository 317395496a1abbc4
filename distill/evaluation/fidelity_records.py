"""The schemas of `fidelity`'s results: over all tokens, on completions, document by document, in parts of the text."""

from typing import Annotated

from pydantic import Field, model_validator

from distill.runs.records import Record, Whole

Count = Annotated[int, Field(ge=1)]


class Part(Record):
    """Fidelity in a part of the text."""

    name: str
    tokens: Whole
    kl: float
    agreement: float


class Band(Part):
    """A part of the window, named by its first and its last position."""

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


class Completions(Record):
    """Fidelity on completions."""

    tokens: Count
    bytes: Whole
    kl: float
    kl_error: float | None = None
    agreement: float
    nll: float
    teacher_nll: float
    bits_per_byte: float | None = None
    teacher_bits_per_byte: float | None = None


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
    completions: Completions | None = None
    by_position: list[Band] = []
    by_source: list[Part] = []
