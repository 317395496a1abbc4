"""What a stage is: it draws losses from a batch, and knows which parameters they train. The trainer knows the rest."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill.ranges import SHARE, Range
from distill.recipe import Batch as BatchSize
from distill.recipe import Length, MicroBatch, TextSource
from distill.schema import Count, Schema
from distill.stages.rates import Point
from distill.stages.targets import Source, Targets
from distill.text.windows import Batch, Calibration
from students.config import Layout
from students.mixers.transfer import Transfer
from students.skeleton import Student
from teachers.teacher import Teacher

Role = Literal["new", "ssm", "window", "norms", "rest"]
ROLES: tuple[str, ...] = get_args(Role)
Transfers = dict[int, Transfer]  # by layer, where its mixer's parameters came from
Rate = Annotated[float, Range(0, 100, above=True)]
Beta = Annotated[float, Range(0, 1, below=True)]


class StageOptions(Schema):
    """What every stage takes."""

    tokens: Count
    """Tokens of text that the stage reads."""


class TrainingOptions(StageOptions):
    """What every stage that trains takes."""

    lr: Rate | dict[Role, Rate]
    """The learning rate: one for all, or one for each role of the parameters that the stage trains. Roles: `new` (gates,
    decays, scales and norms of mixers, meta tokens), `ssm` and `window` (the mixers' projections), `norms` and `rest` (the
    teacher's own parameters)."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """How the rate changes. `wsd` warms up, stays, and falls linearly over the last `decay` share of the steps; `cosine`
    falls from the end of the warm-up on; both fall to `final` of the rate."""
    warmup: Annotated[float, SHARE] = 0.1
    """Share of the steps over which the rate rises."""
    decay: Annotated[float, SHARE] = 0.2
    """Share of the steps over which the rate falls, of `wsd`."""
    final: Annotated[float, SHARE] = 0.0
    """Share of the rate that is left at the end."""
    batch: BatchSize | None = None
    """Windows an optimizer step. Where none is given, `data.batch`."""
    micro_batch: MicroBatch | None = None
    """Windows at a time, or `auto` as for `data.micro_batch`. Where none is given, `data.micro_batch`, or a whole step
    where the stage has a `batch` of its own."""
    seq_len: Length | None = None
    """Tokens of a window. Where none is given, `data.seq_len`. See docs/text.md#a-length-and-a-text-for-each-stage."""
    data: Annotated[list[TextSource], Field(min_length=1)] | None = None
    """Sources of the stage's own text, in place of `data.train`."""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's two decay rates of moments."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    """AdamW's weight decay, on matrices alone and on none of the mixers' `new` parameters."""
    clip: Annotated[float, Range(0, 1e9, above=True)] | None = 1.0
    """The largest norm of a step's gradient; `null` clips nothing."""
    compile: bool | None = None
    """Compile decoder layers with torch.compile. Where none is given, on a GPU. Mixers are left as they are, and so is
    what cannot be compiled."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw`: AdamW with float32 moments. `adamw_8bit`: moments of matrices take 8 bits, so that a trained parameter
    takes 10 bytes in place of 16 (needs `pip install 'distill-hybrids[int8]'`). See docs/precision.md#moments-of-8-bits.
    """

    @model_validator(mode="after")
    def _shares(self) -> "TrainingOptions":
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together exceed the whole stage")
        return self

    def rate(self, role: str) -> float:
        """The learning rate of a role.

        Raises:
            ValueError: rates are given by role, and this one has none.
        """
        if isinstance(self.lr, float):
            return self.lr
        if role not in self.lr:
            raise ValueError(f"lr gives rates for {', '.join(self.lr)}, but this stage also trains {role!r} parameters")
        return self.lr[role]


@dataclass(frozen=True)
class LayerLoss:
    """How a layer-by-layer stage's losses are shown. title, label: of the figure and its axis. squared: the root of a loss
    is shown. judged: it stands in every judgement, as the error of each layer's mixer."""

    title: str
    label: str
    squared: bool = False
    judged: bool = False

    def shown(self, loss: float) -> float:
        """The number that is shown for one loss."""
        return loss**0.5 if self.squared else loss


class Stage(nn.Module):
    """Base of the stages. The teacher is kept out of the module's own parameters.

    It reads a `Batch`. A loss on the next token weighs each position by `batch.loss_weights`: 1 where the next token is in
    the same document and is trained on. Of text with chats that is `batch.trained`, 0 at what the assistant did not say;
    else `batch.weights`. A mean divides by their sum, which may be 0, and `size` is that sum: the trainer weighs by it.

    A stage declares what it is; recipes, plans, the pipeline and reports ask for these, never for a stage's name:

        trains          takes optimizer steps; without, its work is closed-form (`begin`, `finish`)
        whole_student   trains the student end to end, its meta tokens too, not layer by layer on the teacher's inputs
        needs_teacher   runs the teacher, or another reference model in its place; `runs` says it by the options
        first           makes the mixers: a recipe begins with it, and it stands nowhere else
        repeats         may stand more than once in a recipe
        for_twin        also trains the twin (the mixers' windows alone); else the next stage gets its tokens there
        records         adds to the weight-transfer record
        changes_layout  converts further layers (Options are `layouts.Further`), which `reinstate` must convert again
        text            the form of text that it reads: plain (with chats among it), or pairs of answers, under its own data
        probed          its loss is measured on the probe batch, with every checkpoint and after every stage
        rates           how fast it trained where that was measured
        layer_loss      how its losses by layer are shown, where it has them
        writes          its `read` runs the student, to write some of its text
    """

    Options: ClassVar[type[StageOptions]]
    trains: ClassVar[bool] = True
    whole_student: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    first: ClassVar[bool] = False
    repeats: ClassVar[bool] = True
    for_twin: ClassVar[bool] = True
    records: ClassVar[bool] = False
    changes_layout: ClassVar[bool] = False
    text: ClassVar[Literal["plain", "pairs"]] = "plain"
    probed: ClassVar[bool] = False
    layer_loss: ClassVar[LayerLoss | None] = None
    writes: bool = False
    rates: ClassVar[tuple[Point, ...]] = ()
    options: Any  # its own `Options`
    taken: dict[int, nn.Module]  # the attention that stood in its new layers; only where `changes_layout`

    def __init__(self, teacher: Teacher, student: nn.Module, options: Any, transfers: Transfers | None = None) -> None:
        """transfers: the weight-transfer record, for stages that add to it."""
        super().__init__()
        self._hidden: tuple[Teacher, nn.Module] = (teacher, student)
        self.options, self.transfers = options, {} if transfers is None else transfers

    @property
    def teacher(self) -> Teacher:
        """The teacher."""
        return self._hidden[0]

    @property
    def running(self) -> Teacher | None:
        """The model that its steps run beside the student: the teacher, another one, or None where they run none."""
        return self.teacher if self.needs_teacher else None

    @property
    def student(self) -> Student:
        """The student."""
        return cast(Student, self._hidden[1])

    @classmethod
    def probe_options(cls) -> StageOptions:
        """Options for measuring its losses on the probe batch, whatever a recipe says; only where `probed`."""
        options: Any = cls.Options
        return options(tokens=1, lr=1.0)

    @classmethod
    def runs(cls, options: Any) -> bool:
        """Whether its steps run a teacher, by its options."""
        return cls.needs_teacher

    @classmethod
    def reads_before(cls, options: Any) -> Literal["student", "teacher"] | None:
        """The model that reads all of its windows once before the first step; None where none does."""
        return None

    @classmethod
    def source(cls, options: Any) -> Source | None:
        """Where its next-token distributions come from; None of a stage that compares none."""
        return None

    def learn_from(self, targets: Targets) -> None:
        """Take what `source` asks for, before `prepare`; only where that is another teacher or a cache."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Change what trains, before a checkpoint's weights are loaded (adapters, own copies); runs again on resume."""

    def begin(self, calibration: Calibration) -> None:
        """Closed-form work on data before the first step. Its results are weights or buffers, so resuming skips it."""

    def read(self, batch: Batch) -> Batch:
        """What `losses` gets of a batch of text; where the stage `writes`, it runs the student for it."""
        return batch

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        """Name and loss, one after the other; each may be sent backward before the next is drawn."""
        raise NotImplementedError

    def size(self, batch: Batch) -> float:
        """How many equal things the losses of a batch are a mean over."""
        raise NotImplementedError

    def measured(self) -> dict[str, float]:
        """Further numbers for evaluations.json and the report, after the last step."""
        return {}

    def finish(self, calibration: Calibration) -> None:
        """Closed-form work after the last step."""

    def reinstate(self) -> None:
        """Shape the student as `finish` left it, before the checkpoint of this finished stage is loaded."""

    @classmethod
    def check(cls, student: Student, options: Any, last: bool) -> None:
        """Refuse options that this student (its weights may be on the meta device) cannot honour.

        Raises:
            ValueError: naming the option.
        """

    @classmethod
    def trained_layers(cls, student: Student, options: Any) -> list[int]:
        """The layers whose mixers it trains: all, or, where its options say `layers: new`, those converted last."""
        return list(student.newest if getattr(options, "layers", "all") == "new" else student.layout.converted)

    @classmethod
    def count(cls, student: Student, options: Any) -> int:
        """How many parameters it will train. By default those of the mixers of its layers."""
        mixers = [student.mixers[layer] for layer in cls.trained_layers(student, options)] if cls.trains else []
        return sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters())

    @classmethod
    def roles(cls, student: Student, options: Any) -> set[str]:
        """The roles of what it will train, known before it is made. By default those of the mixers of its layers."""
        mixers = [student.mixers[layer] for layer in cls.trained_layers(student, options)] if cls.trains else []
        return {role for mixer in mixers for role in mixer.roles().values()}

    def trained(self) -> dict[str, tuple[str, nn.Parameter]]:
        """Name in the student, role and parameter of everything this stage trains. By default the mixers of its layers."""
        return mixer_parameters(self.student, self.trained_layers(self.student, self.options))

    def rate_factor(self, name: str) -> float:
        """What multiplies the rate of a parameter's role, by its name in the student."""
        return 1.0

    def become(self, layout: Layout) -> None:
        """Take the layout that the student is to have, before `begin` or `reinstate`; only where `changes_layout`."""
        raise NotImplementedError

    def changed(self, done: bool) -> set[str]:
        """Names of the student's tensors outside its mixers that differ from the teacher's, during the stage or after."""
        inside = mixer_parameters(self.student)
        return {name for name in self.trained() if name not in inside}

    def blame(self, batch: Batch) -> str | None:
        """Where in a batch a loss that is not finite began, in words, unless the name of the loss says it."""

    def describe(self, loss: float) -> dict[str, float]:
        """Further numbers to log for one loss."""
        return {}


def mixer_parameters(student: Student, layers: Collection[int] | None = None) -> dict[str, tuple[str, nn.Parameter]]:
    """Name in the student, role and parameter of everything in the mixers. layers: of these alone."""
    found: dict[str, tuple[str, nn.Parameter]] = {}
    for layer, mixer in student.mixers.items():
        if layers is not None and layer not in layers:
            continue
        roles, prefix = mixer.roles(), student.mixer_prefix(layer)
        found.update({prefix + name: (roles[name], parameter) for name, parameter in mixer.named_parameters()})
    return found


def meta_parameters(student: Student) -> dict[str, tuple[str, nn.Parameter]]:
    """Name in the student, role and parameter of its meta tokens; empty where it has none."""
    if student.meta_tokens is None:
        return {}
    return {f"meta_tokens.{name}": ("new", parameter) for name, parameter in student.meta_tokens.named_parameters()}
