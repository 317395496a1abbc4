"""The base class of stages and their options: a stage computes losses on a batch and names the parameters to train."""

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
Transfers = dict[int, Transfer]  # by layer: the sources of its mixer's parameters
Rate = Annotated[float, Range(0, 100, above=True)]
Beta = Annotated[float, Range(0, 1, below=True)]


class StageOptions(Schema):
    """Options of every stage."""

    tokens: Count
    """Tokens of text that the stage reads."""


class TrainingOptions(StageOptions):
    """Options of every stage that trains."""

    lr: Rate | dict[Role, Rate]
    """The learning rate: one for all parameters, or one for each role that the stage trains. Roles: `new` (gates, decays,
    scales and norms of mixers, meta tokens), `ssm` and `window` (the mixers' projections), `norms` and `rest` (the
    teacher's own parameters)."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """The learning-rate schedule. Each begins with a warm-up. `wsd` then keeps the rate and lowers it linearly over the last
    `decay` share of the steps; `cosine` lowers it from the end of the warm-up; both end at `final` times the rate.
    `constant` keeps the rate."""
    warmup: Annotated[float, SHARE] = 0.1
    """Share of the steps over which the rate rises."""
    decay: Annotated[float, SHARE] = 0.2
    """Share of the steps over which the rate falls. Only for `wsd`."""
    final: Annotated[float, SHARE] = 0.0
    """Share of the rate that is left at the end."""
    batch: BatchSize | None = None
    """Windows of an optimizer step. Default: `data.batch`."""
    micro_batch: MicroBatch | None = None
    """Windows of a forward and backward pass, or `auto` as for `data.micro_batch`. Default: `data.micro_batch`, or the
    whole batch where the stage has a `batch` of its own."""
    seq_len: Length | None = None
    """Tokens of a window. Default: `data.seq_len`. See docs/text.md#a-length-and-a-text-for-each-stage."""
    data: Annotated[list[TextSource], Field(min_length=1)] | None = None
    """Sources of the stage's own text, in place of `data.train`."""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's decay rates of the first and second moments."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    """AdamW's weight decay. It applies to matrices only, and not to parameters of the role `new`."""
    clip: Annotated[float, Range(0, 1e9, above=True)] | None = 1.0
    """The largest norm of a step's gradient; `null` turns clipping off."""
    compile: bool | None = None
    """Compile decoder layers with torch.compile. Default: on a GPU only. Mixers are not compiled, and parts that cannot be
    compiled run as usual."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw`: AdamW with float32 moments. `adamw_8bit`: moments of matrices take 8 bits, so a trained parameter takes 10
    bytes instead of 16 (needs `pip install 'distill-hybrids[int8]'`). See docs/precision.md#moments-of-8-bits."""

    @model_validator(mode="after")
    def _shares(self) -> "TrainingOptions":
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together exceed the whole stage")
        return self

    def rate(self, role: str) -> float:
        """The learning rate of a role.

        Raises:
            ValueError: `lr` gives rates by role and lacks this one.
        """
        if isinstance(self.lr, float):
            return self.lr
        if role not in self.lr:
            raise ValueError(f"lr gives rates for {', '.join(self.lr)}, but this stage also trains {role!r} parameters")
        return self.lr[role]


@dataclass(frozen=True)
class LayerLoss:
    """How the losses of a layer-by-layer stage are shown. title, label: of the figure and its axis. squared: the root of a
    loss is shown. judged: every evaluation holds these losses, as the error of each layer's mixer."""

    title: str
    label: str
    squared: bool = False
    judged: bool = False

    def shown(self, loss: float) -> float:
        """The number that is shown for one loss."""
        return loss**0.5 if self.squared else loss


class Stage(nn.Module):
    """Base class of stages. Teacher and student are kept out of the module's own parameters.

    A stage reads a `Batch`. A loss on the next token weights each position by `batch.loss_weights`: 1 where the next token
    is in the same document and is trained on. For text with chats these are `batch.trained`, which is 0 outside the
    assistant's answers; else `batch.weights`. A mean divides by their sum, which may be 0. `size` returns that sum, and the
    trainer weights the batch by it.

    A stage declares its properties; recipes, plans, the pipeline and reports read these and never a stage's name:

        trains          takes optimizer steps; if not, its work is closed-form (`begin`, `finish`)
        whole_student   trains the student end to end with its meta tokens, not layer by layer on the teacher's inputs
        needs_teacher   runs the teacher, or another reference model in its place; `runs` decides by the options
        first           makes the mixers: a recipe begins with it, and it may come nowhere else
        repeats         may occur more than once in a recipe
        for_twin        also trains the window-only control (twin); if not, the control's next stage gets its tokens
        records         adds to the weight-transfer record
        changes_layout  converts further layers (Options are `layouts.Further`), which `reinstate` must convert again
        text            the form of text that it reads: plain (which includes chats), or pairs of answers from its own `data`
        probed          its loss is measured on the probe batch, with every checkpoint and after every stage
        rates           its measured training speeds
        layer_loss      how its losses by layer are shown, if it has them
        writes          its `read` runs the student, which writes part of the text
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
    options: Any  # of the class's own `Options`
    taken: dict[int, nn.Module]  # the attention that its new mixers replaced, by layer; only where `changes_layout`

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
        """The model that its steps run in addition to the student: the teacher, another one, or None."""
        return self.teacher if self.needs_teacher else None

    @property
    def student(self) -> Student:
        """The student."""
        return cast(Student, self._hidden[1])

    @classmethod
    def probe_options(cls) -> StageOptions:
        """Options for measuring its losses on the probe batch, the same for every recipe; only where `probed`."""
        options: Any = cls.Options
        return options(tokens=1, lr=1.0)

    @classmethod
    def runs(cls, options: Any) -> bool:
        """Whether its steps run a teacher with these options."""
        return cls.needs_teacher

    @classmethod
    def reads_before(cls, options: Any) -> Literal["student", "teacher"] | None:
        """Which model reads all windows of the stage once before the first step; None if none does."""
        return None

    @classmethod
    def source(cls, options: Any) -> Source | None:
        """The source of the teacher's next-token distributions; None for a stage that does not compare any."""
        return None

    def learn_from(self, targets: Targets) -> None:
        """Take the opened `source`, before `prepare`; only called where it is another teacher or a cache."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Set up the trained parameters (adapters, own copies) before a checkpoint is loaded; runs again on resume."""

    def begin(self, calibration: Calibration) -> None:
        """Do closed-form work on data before the first step. The results are weights or buffers, so resuming skips it."""

    def read(self, batch: Batch) -> Batch:
        """The batch that `losses` gets, made from a batch of text; a stage that `writes` runs the student here."""
        return batch

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        """Yield pairs of name and loss; the caller may run backward on each before it draws the next."""
        raise NotImplementedError

    def size(self, batch: Batch) -> float:
        """The number of equally weighted items (tokens, windows, pairs) that the losses of a batch are a mean over."""
        raise NotImplementedError

    def measured(self) -> dict[str, float]:
        """Further measurements after the last step, for evaluations.json and the report."""
        return {}

    def finish(self, calibration: Calibration) -> None:
        """Do closed-form work after the last step."""

    def reinstate(self) -> None:
        """Give the student the structure that `finish` left, before the checkpoint of this finished stage is loaded."""

    @classmethod
    def check(cls, student: Student, options: Any, last: bool) -> None:
        """Refuse options that do not fit this student. Its weights may be on the meta device.

        Raises:
            ValueError: naming the option.
        """

    @classmethod
    def trained_layers(cls, student: Student, options: Any) -> list[int]:
        """The layers whose mixers are trained: all, or with `layers: new` those converted last."""
        return list(student.newest if getattr(options, "layers", "all") == "new" else student.layout.converted)

    @classmethod
    def count(cls, student: Student, options: Any) -> int:
        """The number of parameters that the stage will train. By default those of the mixers of `trained_layers`."""
        mixers = [student.mixers[layer] for layer in cls.trained_layers(student, options)] if cls.trains else []
        return sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters())

    @classmethod
    def roles(cls, student: Student, options: Any) -> set[str]:
        """The roles of the parameters that the stage will train. By default those of the mixers of `trained_layers`."""
        mixers = [student.mixers[layer] for layer in cls.trained_layers(student, options)] if cls.trains else []
        return {role for mixer in mixers for role in mixer.roles().values()}

    def trained(self) -> dict[str, tuple[str, nn.Parameter]]:
        """All trained parameters: name in the student to (role, parameter). By default the mixers of `trained_layers`."""
        return mixer_parameters(self.student, self.trained_layers(self.student, self.options))

    def rate_factor(self, name: str) -> float:
        """The factor on the learning rate of a parameter, by its name in the student."""
        return 1.0

    def become(self, layout: Layout) -> None:
        """Set the layout after the stage, before `begin` or `reinstate`; only where `changes_layout`."""
        raise NotImplementedError

    def changed(self, done: bool) -> set[str]:
        """Names of the student's tensors outside its mixers that differ from the teacher's, during the stage or after."""
        inside = mixer_parameters(self.student)
        return {name for name in self.trained() if name not in inside}

    def blame(self, batch: Batch) -> str | None:
        """A sentence on the origin of a loss that is not finite; None where the name of the loss tells it."""

    def describe(self, loss: float) -> dict[str, float]:
        """Further numbers to log for one loss."""
        return {}


def mixer_parameters(student: Student, layers: Collection[int] | None = None) -> dict[str, tuple[str, nn.Parameter]]:
    """The parameters of the mixers: name in the student to (role, parameter). layers: None for all."""
    found: dict[str, tuple[str, nn.Parameter]] = {}
    for layer, mixer in student.mixers.items():
        if layers is not None and layer not in layers:
            continue
        roles, prefix = mixer.roles(), student.mixer_prefix(layer)
        found.update({prefix + name: (roles[name], parameter) for name, parameter in mixer.named_parameters()})
    return found


def meta_parameters(student: Student) -> dict[str, tuple[str, nn.Parameter]]:
    """The parameters of the meta tokens: name in the student to (role, parameter); empty if it has none."""
    if student.meta_tokens is None:
        return {}
    return {f"meta_tokens.{name}": ("new", parameter) for name, parameter in student.meta_tokens.named_parameters()}
