"""A recipe as data: one strict schema, and its text as YAML.

What a recipe names of a table (stages, scorers, export targets) is checked by whoever has the table: `recipe_file.check`
asks them all.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from distill.errors import HIDDEN, UserError, nearest
from distill.ranges import DISTANT, LONGEST, MANY, Range, whole
from distill.schema import COUNTED, Count, Letter, Name, Schema, explain
from distill.yaml_file import dump

DOCUMENTS = 32  # that a judged table rests on
LONGEST_DOCUMENT = 128 * 10**6  # bytes of UTF-8
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")  # accelerate's

Length = Annotated[int, whole(8, LONGEST)]  # of a window of text
FewTokens = Annotated[int, *COUNTED, whole(1, LONGEST)]  # that are read at once
Batch = Annotated[int, whole(1, 65_536)]  # windows at a time


MicroBatch = Batch | Literal["auto"]  # auto: as many as fit the device's memory


class TextSource(Schema):
    """One entry of `data.train`, `data.heldout` or a stage's own `data`."""

    path: str | None = None
    """Local files: a glob of jsonl, json, parquet, txt or csv, plain or compressed, relative to the folder that the
    command runs in; `shipped:NAME` for the project's own text. A file of exactly this name is taken before the glob is."""
    hub: str | None = None
    """A data set of the hub by its name, or its local folder; it is streamed as far as the run's tokens go. Give either
    `path` or `hub`."""
    name: str | None = None
    """The configuration of a data set of the hub."""
    split: str = "train"
    """The split of a data set of the hub."""
    column: str = "text"
    """The column to read: text, or a chat's messages. Where a row has no `text`, `messages` is read, else `prompt` and
    `completion`; `prompt+completion` asks for those two. See docs/text.md#chat-data."""
    label: str | None = None
    """The name that the source's rows are counted under. Where none is given: the row's column `source`, else the name of
    the file or data set."""
    weight: Annotated[float, Range(1e-6, 1e6)] | None = None
    """The source's share of the tokens, in proportion to the other weights; a small source is repeated. Without weights
    all sources are shuffled together."""
    documents: Literal["file", "paragraphs", "lines"] | None = None
    """What of a .txt file is one document: the whole `file` (where none is given), `paragraphs` between blank lines, or
    `lines`."""
    train_on: Literal["all", "completions"] | None = None
    """Which tokens are trained on: `all`, or `completions`, what the assistant said alone. Where none is given:
    `completions` where rows are chats, else `all`."""

    @model_validator(mode="after")
    def _one_place(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source of text needs either path or hub")
        return self


class Data(Schema):
    """What to read, and how it is cut: windows of `seq_len` tokens, `batch` windows an optimizer step."""

    CLOSED_FORM: ClassVar[int] = 8  # windows at a time, at most, of closed-form work where micro_batch is auto

    train: Annotated[list[TextSource], Field(min_length=1)]
    """Sources of the text that is trained on."""
    heldout: Annotated[list[TextSource], Field(min_length=1)]
    """Sources of the text that tables are made of; nothing is trained on it."""
    seq_len: Length
    """Tokens of a window. Documents are packed into windows, and nothing leaks from one to the next."""
    batch: Batch
    """Windows an optimizer step."""
    micro_batch: MicroBatch | None = None
    """Windows at a time; the gradients of a step are added up. Where none is given, a whole step at once. `auto`: the most
    that fit, a divisor of each process's share of a step. It is found by dry steps on a GPU, by the stage's footprint
    elsewhere, written into the run folder and kept. Closed-form work takes at most 8 windows at a time."""
    separator: str | None = None
    """The token that ends a document. Where none is given, the tokenizer's end-of-sequence token. A row that holds it
    begins a new document behind it, but not between the turns of a chat in the tokenizer's own template."""
    long_documents: Literal["shuffled", "in_order"] = "shuffled"
    """The order of windows of a document longer than a window: `shuffled` draws every window on its own; `in_order` lets
    them follow each other."""
    limit: Count | None = None
    """Tokens to prepare of each training text at most. Where none is given: all of local files, and of streamed data sets
    as many as the run reads."""
    longest_document: Annotated[Count, whole(1, 2**31 - 1)] = LONGEST_DOCUMENT
    """Bytes of UTF-8 that a document may have. What preparing text takes of memory grows with it."""

    @property
    def calibrated(self) -> int:
        """Windows at a time of closed-form work: its results must not depend on the device."""
        return min(self.batch, self.CLOSED_FORM) if self.micro_batch == "auto" else self.micro_batch or self.batch


class EvaluationOptions(Schema):
    """How the student is judged: held-out text for the table after each stage and for the final one, and passkey texts."""

    tokens: Count = 16_384
    """Held-out tokens that the table after each stage reads."""
    final_tokens: Count | None = None
    """Held-out tokens that the final table reads. Where none is given, as many as `tokens`."""
    documents: Annotated[int, whole(1, MANY)] = DOCUMENTS
    """Windows, one a document as long as there are documents, that judged tables read at least. With fewer, an error over
    documents is a guess."""
    seq_len: Length | None = None
    """Tokens of a held-out window. Where none is given, `data.seq_len`."""
    probe_tokens: FewTokens = 1024
    """Tokens of the fixed batch on which a checkpoint is proved when a run goes on."""
    passkey: Annotated[list[Annotated[int, whole(64, LONGEST)]], Field(max_length=64)] = [256, 512]
    """Lengths in tokens of the texts that hide a passkey."""
    passkey_trials: Annotated[int, whole(1, MANY)] = 10
    """Passkey texts of each length."""


class Selected(Schema):
    """What chose a layout that is written out. Tables of the student mark what it read as in-sample. `distill select
    --write` fills it in."""

    by: str
    """The scorer that chose the layout."""
    families: list[str] = []
    """The recall families that it read."""
    tasks: list[str] = []
    """The tasks that it read."""


class Checkpoints(Schema):
    """How often a stage saves itself."""

    minutes: Annotated[float, Range(0, 1e5, above=True)] = 5.0
    """Minutes between two saves."""
    steps: Annotated[int, whole(1, DISTANT)] | None = None
    """Optimizer steps between two saves. Where given, `minutes` is not used."""
    keep: Annotated[int, whole(1, MANY)] = 2
    """Checkpoints that are kept, the latest ones."""


class Recipe(Schema):
    """A whole recipe. An unknown key is an error that names the nearest valid one."""

    renamed: ClassVar[dict[str, str]] = {"teacher_4bit": "teacher_dtype: int8"}

    name: Name
    """The name of the run folder. Where none is given, the recipe's file name."""
    teacher: Annotated[str, Field(min_length=1)]
    """The pretrained Transformer: `org/name` on the hub, a folder, a `.gguf` file, or `package:NAME/FILE.gguf`, a file of
    an installed package (also in pieces, `FILE.gguf.part00` ..., in it and the packages that it requires)."""
    teacher_trust_remote_code: bool = False
    """Run the code that comes with the teacher's checkpoint."""
    teacher_pickle: bool = False
    """Read a checkpoint that is a pickle. A pickle can run code."""
    teacher_ignore: list[str] = []
    """Names or patterns of tensors that the model has no place for, `model.layers.3.*` for one. Any other such tensor is
    refused."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """The type that the teacher is held in, and what of the student no stage trains. `auto`: the checkpoint's own on a GPU
    (float16 and quantised GGUF files as bfloat16); float32 on a CPU and with `precision: float32`. `int8`: bfloat16 with
    int8 linear layers, by torchao (`pip install 'distill-hybrids[int8]'`). See docs/precision.md."""
    student: Annotated[str, Field(min_length=1)] | None = None
    """A finished student that the run starts from: a run folder, or a student's own folder. There is no `initialise` then;
    `pattern` and `mixers` are left out or agree, and `twin` is refused. A student with adapters beside it is refused:
    `distill export` merges them."""
    pattern: str | dict[str, Any]
    """The student's layout: one letter a layer, repeated over depth. `A` keeps the teacher's attention; every other letter
    is a mixer. A mapping, `{keep: 0.25, by: recall}`, has the run select the layout by a scorer."""
    mixers: dict[Letter, dict[str, Any]]
    """For each letter of `pattern` a mixer and its options: `M: {mixer: mamba2}`."""
    meta_tokens: Annotated[int, whole(0, 65_536)] = 0
    """Learned vectors in front of every document. Stages that train the student end to end train them, with the rate of
    `new`. A window sees them always where it has as many `sinks`."""
    selected: Selected | None = None
    """What chose a layout that is written out."""
    data: Data
    """The texts, and how they are cut into windows."""
    stages: list[dict[str, dict[str, Any]]]
    """The training stages in order, each one entry: `- align: {tokens: 12k, lr: 1e-3}`. `initialise` comes first unless
    `student` is given."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """How the student is judged."""
    export: list[str] = []
    """Forms that are written when the run ends. `distill plan` says which of them can hold the recipe's student."""
    twin: bool = False
    """Also train the window-only control: the same student without its state-space branches, on the same text."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of arithmetic. `auto`: bfloat16 autocast on a GPU, float32 elsewhere. Trained parameters are float32 either
    way."""
    shard: Literal["auto", "none", "student", "all"] = "auto"
    """What several processes divide of stages that train the student end to end: `none`, `student` (its float32 masters,
    gradients and moments), or `all` (the teacher's layers too). `auto`: the first of these that fits. A run may go on with
    another value. See docs/scaling.md#what-is-divided."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the run computes. `auto`: on a GPU where there is one."""
    checkpoints: Checkpoints = Checkpoints()
    """When a stage saves itself on its way."""
    trackers: list[str] = []
    """accelerate's trackers by name. Each has one run for a student and one for its twin, with steps counted over all
    stages; files go to `trackers/` in the run folder."""
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0
    """The seed of the text's order, of initialisation and of sampling."""

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
    """What of a .txt file is one document: the whole `file` (where none is given), `paragraphs` between blank lines, or
    `lines`."""
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
