"""A recipe as data: one strict schema, and its text as YAML.

What a recipe names of a table (stages, scorers, export targets) is checked by whoever has the table: `recipe_file.check`
asks them all.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from distill.errors import HIDDEN, UserError, nearest
from distill.ranges import DISTANT, LONGEST, MANY, Range, whole
from distill.schema import Count, Letter, Name, Schema, count, explain
from distill.yaml_file import dump

DOCUMENTS = 32  # that a judged table rests on
LONGEST_DOCUMENT = 128 * 10**6  # bytes of UTF-8
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")  # accelerate's

Length = Annotated[int, whole(8, LONGEST)]  # of a window of text
FewTokens = Annotated[int, BeforeValidator(count), whole(1, LONGEST)]  # that are read at once
Batch = Annotated[int, whole(1, 65_536)]  # windows at a time


MicroBatch = Batch | Literal["auto"]  # auto: as many as fit the device's memory


class TextSource(Schema):
    """A source of text. `path`: local files (a glob; `shipped:NAME` for the project's own) or `hub`: a dataset id.
    `column`: text, or a chat's messages, or `prompt+completion` for those two. `documents`: what of a .txt file is one: the
    file (the default), paragraphs between blank lines, or lines. `train_on`: every token, or what the assistant said alone;
    by default the second where the rows have completions."""

    path: str | None = None
    hub: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    label: str | None = None
    weight: Annotated[float, Range(1e-6, 1e6)] | None = None
    documents: Literal["file", "paragraphs", "lines"] | None = None
    train_on: Literal["all", "completions"] | None = None

    @model_validator(mode="after")
    def _one_place(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source of text needs either path or hub")
        return self


class Data(Schema):
    """What to read, and how it is cut: windows of `seq_len` tokens, `batch` windows an optimizer step. `longest_document`:
    bytes that a document may have; what preparing text takes of memory grows with it."""

    CLOSED_FORM: ClassVar[int] = 8  # windows at a time, at most, of closed-form work where micro_batch is auto

    train: Annotated[list[TextSource], Field(min_length=1)]
    heldout: Annotated[list[TextSource], Field(min_length=1)]
    seq_len: Length
    batch: Batch
    micro_batch: MicroBatch | None = None
    separator: str | None = None
    long_documents: Literal["shuffled", "in_order"] = "shuffled"
    limit: Count | None = None
    longest_document: Annotated[Count, Field(lt=2**31)] = LONGEST_DOCUMENT

    @property
    def calibrated(self) -> int:
        """Windows at a time of closed-form work: its results must not depend on the device."""
        return min(self.batch, self.CLOSED_FORM) if self.micro_batch == "auto" else self.micro_batch or self.batch


class EvaluationOptions(Schema):
    """Held-out tokens for the table after each stage and for the final one, windows of `seq_len`, and passkey lengths.

    documents: windows, one a document as long as there are documents, that judged tables read at least: fewer, and an error
    over documents is a guess.
    """

    tokens: Count = 16_384
    final_tokens: Count | None = None
    documents: Annotated[int, whole(1, MANY)] = DOCUMENTS
    seq_len: Length | None = None
    probe_tokens: FewTokens = 1024
    passkey: Annotated[list[Annotated[int, whole(64, LONGEST)]], Field(max_length=64)] = [256, 512]
    passkey_trials: Annotated[int, whole(1, MANY)] = 10


class Selected(Schema):
    """What chose a layout that is written out: the scorer, and the recall families and tasks that it read. In tables of its
    student they are in-sample."""

    by: str
    families: list[str] = []
    tasks: list[str] = []


class Checkpoints(Schema):
    """How often a stage saves itself: after so many minutes, or steps."""

    minutes: Annotated[float, Range(0, 1e5, above=True)] = 5.0
    steps: Annotated[int, whole(1, DISTANT)] | None = None
    keep: Annotated[int, whole(1, MANY)] = 2


class Recipe(Schema):
    """A whole recipe. `pattern`, one entry a letter, and `meta_tokens` (learned ones in front of every document) make the
    student's layout; a mapping as `pattern` has the run select it (distill/selection), and `selected` says of a layout that
    was written out by what. `student`: a folder of a finished one that the run starts from; the layout is its own. `stages`
    run in order. teacher_dtype: the type that the teacher is held in, and what of the student no stage trains; auto: its
    checkpoint's on a GPU, float32 elsewhere. `shard`: what several processes divide of stages that train the student end to
    end: none, the student's masters, gradients and moments, or all, the teacher's layers too."""

    renamed: ClassVar[dict[str, str]] = {"teacher_4bit": "teacher_dtype: int8"}

    name: Name
    teacher: Annotated[str, Field(min_length=1)]
    teacher_trust_remote_code: bool = False
    teacher_pickle: bool = False
    teacher_ignore: list[str] = []
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    student: Annotated[str, Field(min_length=1)] | None = None
    pattern: str | dict[str, Any]
    mixers: dict[Letter, dict[str, Any]]
    meta_tokens: Annotated[int, whole(0, 65_536)] = 0
    selected: Selected | None = None
    data: Data
    stages: list[dict[str, dict[str, Any]]]
    evaluation: EvaluationOptions = EvaluationOptions()
    export: list[str] = []
    twin: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    shard: Literal["auto", "none", "student", "all"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoints: Checkpoints = Checkpoints()
    trackers: list[str] = []
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0

    @property
    def selects(self) -> bool:
        """Whether the layout is selected by the run, not written out."""
        return isinstance(self.pattern, dict)

    @property
    def fingerprint(self) -> str:
        """Eight digits that change with anything in the recipe."""
        entries = self.model_dump(mode="json")
        del entries["shard"]  # a run goes on whoever holds which part of it
        for name in ("teacher_ignore", "selected", "student"):  # recipes from before these were there keep their runs
            if not entries[name]:
                del entries[name]
        if entries["teacher_dtype"] == "auto":  # likewise
            del entries["teacher_dtype"]
        if entries["evaluation"]["documents"] == DOCUMENTS:  # likewise
            del entries["evaluation"]["documents"]
        if entries["data"]["longest_document"] == LONGEST_DOCUMENT:  # likewise
            del entries["data"]["longest_document"]
        for source in entries["data"]["train"] + entries["data"]["heldout"]:
            for name in ("documents", "train_on"):
                if source[name] is None:
                    del source[name]
        text = json.dumps(entries, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def yaml(self) -> str:
        """The recipe as YAML; what was not given is left out."""
        return dump(self.model_dump(mode="json", exclude_unset=True))


def parse(entries: dict, where: str) -> Recipe:
    """Validate a recipe's entries by the schema alone.

    Raises:
        UserError: with every complaint, each naming its key.
    """
    _check_text(entries, where)
    try:
        recipe = Recipe(**entries)
    except ValidationError as error:
        raise UserError(explain(error, where, Recipe)) from error
    for stage in recipe.stages:
        if len(stage) != 1:
            raise UserError(f"{where}: each entry of stages is one stage, not {', '.join(stage) or 'nothing'}")
    for tracker in recipe.trackers:
        if tracker not in TRACKERS:
            raise UserError(f"{where}: trackers: there is no tracker {tracker!r}; {nearest(tracker, TRACKERS)}")
    if not recipe.mixers:
        raise UserError(f"{where}: mixers is empty, so no layer would be converted; give a mixer for a letter of pattern")
    return recipe


def _check_text(entries: Any, where: str) -> None:
    """Refuse text that no file can be named by and no terminal should be given: escape characters, NUL, half characters."""
    waiting = [("", entries)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str) and (found := HIDDEN.search(value)):
            raise UserError(
                f"{where}: {place.lstrip('.') or 'a key'} is {value!r}, which holds the character {found[0]!r}, and that is "
                "none of a text; take it out"
            )
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in parts:
            waiting += [("", key), (f"{place}.{key}", part)] if isinstance(key, str) else [(f"{place}.{key}", part)]
