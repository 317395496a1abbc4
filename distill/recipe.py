"""The schema of a recipe, and its text as YAML.

The names of stages, scorers and export targets are checked by the modules that have these tables; `recipe_file.check` calls
all of them.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from distill.errors import HIDDEN, UserError, nearest
from distill.ranges import DISTANT, LONGEST, MANY, Range, whole
from distill.schema import COUNTED, Count, Letter, Name, Schema, explain
from distill.yaml_file import dump

DOCUMENTS = 32  # held-out documents of a table, by default
LONGEST_DOCUMENT = 128 * 10**6  # bytes of UTF-8
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")  # accelerate's

Length = Annotated[int, whole(8, LONGEST)]  # tokens of a window
FewTokens = Annotated[int, *COUNTED, whole(1, LONGEST)]  # tokens that are read at once
Batch = Annotated[int, whole(1, 65_536)]  # windows


MicroBatch = Batch | Literal["auto"]  # auto: as many as fit the device's memory


class TextSource(Schema):
    """One entry of `data.train`, `data.heldout` or a stage's own `data`."""

    path: str | None = None
    """Local files: a glob of jsonl, json, parquet, txt or csv files, plain or compressed, relative to the folder that the
    command runs in; `shipped:NAME` for text that comes with the project. A file of exactly this name is preferred to the
    glob."""
    hub: str | None = None
    """The name of a data set of the hub, or its local folder. It is streamed until the run has its tokens. Give either
    `path` or `hub`."""
    name: str | None = None
    """The configuration of a data set of the hub."""
    split: str = "train"
    """The split of a data set of the hub."""
    column: str = "text"
    """The column to read: text, or a chat's messages. If a row has no `text`, its `messages` are read, else its `prompt`
    and `completion`; `prompt+completion` asks for those two. See docs/text.md#chat-data."""
    label: str | None = None
    """The name under which the source's rows are counted. If not given: the row's column `source`, else the name of the
    file or data set."""
    weight: Annotated[float, Range(1e-6, 1e6)] | None = None
    """The source's share of the tokens, relative to the weights of the other sources; a small source is repeated. Without
    weights all sources are shuffled together."""
    documents: Literal["file", "paragraphs", "lines"] | None = None
    """How a .txt file is cut into documents: the whole `file` (if not given), `paragraphs` between blank lines, or
    `lines`."""
    train_on: Literal["all", "completions"] | None = None
    """The tokens that are trained on: `all`, or only `completions`, the assistant's answers. If not given: `completions`
    for chats, else `all`."""

    @model_validator(mode="after")
    def _one_place(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source of text needs either path or hub")
        return self


class Data(Schema):
    """The texts, and how they are cut: windows of `seq_len` tokens, `batch` windows in each optimizer step."""

    CLOSED_FORM: ClassVar[int] = 8  # the most windows at a time in closed-form work if micro_batch is auto

    train: Annotated[list[TextSource], Field(min_length=1)]
    """Sources of the training text."""
    heldout: Annotated[list[TextSource], Field(min_length=1)]
    """Sources of the held-out text, on which tables are measured. It is never trained on."""
    seq_len: Length
    """Tokens of a window. Documents are packed into windows; no document reads from another."""
    batch: Batch
    """Windows of an optimizer step (the batch size)."""
    micro_batch: MicroBatch | None = None
    """Windows that are computed at a time; the gradients of a step are accumulated. If not given, the whole step at once.
    `auto`: the most that fit, a divisor of each process's share of a step. It is found by dry steps on a GPU, by the
    stage's footprint elsewhere, saved in the run folder and kept. Closed-form work takes at most 8 windows at a time."""
    separator: str | None = None
    """The end-of-document token. If not given, the tokenizer's end-of-sequence token. If a row contains it, a new document
    begins after it, except between the turns of a chat in the tokenizer's own template."""
    long_documents: Literal["shuffled", "in_order"] = "shuffled"
    """The order of the windows of a document longer than a window: `shuffled` draws each window independently; `in_order`
    keeps them in sequence."""
    limit: Count | None = None
    """The most tokens to prepare of each training text. If not given: all of local files, and of streamed data sets as many
    as the run reads."""
    longest_document: Annotated[Count, whole(1, 2**31 - 1)] = LONGEST_DOCUMENT
    """The most UTF-8 bytes of a document. The memory for preparing text grows with it."""

    @property
    def calibrated(self) -> int:
        """Windows at a time in closed-form work, whose results must not depend on the device."""
        return min(self.batch, self.CLOSED_FORM) if self.micro_batch == "auto" else self.micro_batch or self.batch


class EvaluationOptions(Schema):
    """How the student is evaluated: held-out text for the table after each stage and the final table, and passkey texts."""

    tokens: Count = 16_384
    """Held-out tokens for the table after each stage."""
    final_tokens: Count | None = None
    """Held-out tokens for the final table. If not given, as many as `tokens`."""
    documents: Annotated[int, whole(1, MANY)] = DOCUMENTS
    """The least number of held-out windows for a table, one from each document while documents last. With fewer, the
    standard error over documents is unreliable."""
    seq_len: Length | None = None
    """Tokens of a held-out window. If not given, `data.seq_len`."""
    probe_tokens: FewTokens = 1024
    """Tokens of the fixed batch on which a checkpoint is checked when a run continues."""
    passkey: Annotated[list[Annotated[int, whole(64, LONGEST)]], Field(max_length=64)] = [256, 512]
    """Lengths in tokens of the prompts that hide a passkey."""
    passkey_trials: Annotated[int, whole(1, MANY)] = 10
    """Passkey prompts of each length."""


class Selected(Schema):
    """How a written-out layout was selected. Tables mark the evaluations that the selection read as in-sample. `distill
    select --write` fills it in."""

    by: str
    """The scorer that chose the layout."""
    families: list[str] = []
    """The recall families that the scorer read."""
    tasks: list[str] = []
    """The tasks that the scorer read."""


class Checkpoints(Schema):
    """How often a stage saves a checkpoint."""

    minutes: Annotated[float, Range(0, 1e5, above=True)] = 5.0
    """Minutes between two saves."""
    steps: Annotated[int, whole(1, DISTANT)] | None = None
    """Optimizer steps between two saves. If given, `minutes` is not used."""
    keep: Annotated[int, whole(1, MANY)] = 2
    """The number of latest checkpoints that are kept."""


class Recipe(Schema):
    """A whole recipe. An unknown key is an error that names the nearest valid one."""

    renamed: ClassVar[dict[str, str]] = {"teacher_4bit": "teacher_dtype: int8"}

    name: Name
    """The name of the run folder. If not given, the recipe's file name."""
    teacher: Annotated[str, Field(min_length=1)]
    """The pretrained Transformer: `org/name` on the hub, a folder, a `.gguf` file, or `package:NAME/FILE.gguf` for a file
    of an installed package (also in pieces, `FILE.gguf.part00` ..., in the package and those that it requires)."""
    teacher_trust_remote_code: bool = False
    """Run the code that comes with the teacher's checkpoint."""
    teacher_pickle: bool = False
    """Read a checkpoint that is a pickle. A pickle can run code."""
    teacher_ignore: list[str] = []
    """Names or patterns of checkpoint tensors that the model does not have and that may be ignored, such as
    `model.layers.3.*`. Any other such tensor is refused."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """The type of the teacher's weights, and of the student's weights that no stage trains. `auto`: the checkpoint's own on
    a GPU (float16 and quantised GGUF files as bfloat16); float32 on a CPU and with `precision: float32`. `int8`: bfloat16
    with int8 linear layers, by torchao (`pip install 'distill-hybrids[int8]'`). See docs/precision.md."""
    student: Annotated[str, Field(min_length=1)] | None = None
    """A finished student from which the run starts: a run folder, or a student's own folder. There is then no `initialise`;
    `pattern` and `mixers` are left out or equal to the student's, and `twin` is refused. A student with unmerged adapters
    is refused; `distill export` merges them."""
    pattern: str | dict[str, Any]
    """The student's layout: one letter for each layer, repeated over the depth. `A` keeps the teacher's attention; every
    other letter is a mixer. With a mapping, `{keep: 0.25, by: recall}`, the run selects the layout by a scorer."""
    mixers: dict[Letter, dict[str, Any]]
    """A mixer and its options for each letter of `pattern` except `A`: `M: {mixer: mamba2}`."""
    meta_tokens: Annotated[int, whole(0, 65_536)] = 0
    """The number of learned vectors in front of every document. Stages that train the student end to end train them, at the
    learning rate of `new`. A window always sees them if it has as many `sinks`."""
    selected: Selected | None = None
    """How a written-out layout was selected."""
    data: Data
    """The texts, and how they are cut into windows."""
    stages: list[dict[str, dict[str, Any]]]
    """The training stages in order, one entry for each: `- align: {tokens: 12k, lr: 1e-3}`. `initialise` comes first unless
    `student` is given."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """How the student is evaluated."""
    export: list[str] = []
    """Export targets that are written when the run ends. `distill plan` says which of them can hold the recipe's student."""
    twin: bool = False
    """Also train the window-only control: the same student without its state-space branches, on the same text."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of arithmetic. `auto`: bfloat16 autocast on a GPU, float32 elsewhere. Trained parameters are float32 either
    way."""
    shard: Literal["auto", "none", "student", "all"] = "auto"
    """What several processes divide in stages that train the student end to end: `none`, `student` (its float32 masters,
    gradients and moments), or `all` (the teacher's layers too). `auto`: the first of these that fits. A run may continue
    with another value. See docs/scaling.md#what-is-divided."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device of the run. `auto`: a GPU if there is one."""
    checkpoints: Checkpoints = Checkpoints()
    """When a stage saves checkpoints."""
    trackers: list[str] = []
    """Experiment trackers of accelerate by name. Each has one run for the student and one for its window-only control, with
    steps counted over all stages; files go to `trackers/` in the run folder."""
    seed: Annotated[int, whole(0, 2**32 - 1)] = 0
    """The seed of the text's order, of initialisation and of sampling."""

    @property
    def selects(self) -> bool:
        """Whether the layout is selected by the run, not written out."""
        return isinstance(self.pattern, dict)

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with any entry of the recipe except `shard`."""
        entries = self.model_dump(mode="json")
        del entries["shard"]  # a run can continue with another division over processes
        for name in ("teacher_ignore", "selected", "student"):  # recipes from before these keys keep their fingerprint
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
        """The recipe as YAML, without the keys that were not given."""
        return dump(self.model_dump(mode="json", exclude_unset=True))


def parse(entries: dict, where: str) -> Recipe:
    """Validate a recipe's entries by the schema alone.

    Raises:
        UserError: with every error, each naming its key.
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
    """Refuse control characters and lone surrogates in a recipe's keys and values.

    Raises:
        UserError: naming the key and the character.
    """
    waiting = [("", entries)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str) and (found := HIDDEN.search(value)):
            raise UserError(
                f"{where}: {place.lstrip('.') or 'a key'} is {value!r}, which holds the unprintable character {found[0]!r}; "
                "remove it"
            )
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in parts:
            waiting += [("", key), (f"{place}.{key}", part)] if isinstance(key, str) else [(f"{place}.{key}", part)]
