"""Stage replace: progressive replacement, which converts further attention layers of the current student to mixers.

The Mamba in the Llama (arXiv 2408.15237) converts some layers, distils, and then converts more layers of the result. In its
ablation the perplexity was 2.20 step by step and 2.29 with all layers at once. The new mixers are made from the student's
own attention, which earlier stages may have trained. They copy its projections (`Mixer.from_attention`). Their constants
and output scales are solved on its inputs and outputs in the student, as in `initialise`.

Mixers that exist already do not change. Later stages know which mixers are new (`layers: new`).
"""

from typing import cast

from torch import nn

from distill.build import as_source, further_mixers
from distill.mixed_types import join_types
from distill.stages.initialise import Initialise
from distill.stages.layouts import Further
from distill.stages.stage import Stage, Transfers
from distill.text.windows import Calibration
from students.config import Layout
from students.converting import convert, further
from students.mixers.mixer import Mixer
from students.skeleton import Student
from teachers.teacher import Teacher

MADE_FROM = "(made from)"  # in the weight-transfer record


class Unplaced(nn.Module):
    """Mixers that are not in a student yet, with the attributes that closed-form initialisation reads of a student."""

    def __init__(self, mixers: dict[int, Mixer]) -> None:
        super().__init__()
        self.mixers = mixers
        self.givers: dict[int, int] = {}


class InitialiseFurther(Initialise):
    """`initialise` for mixers outside the student, solved on the student's own inputs and outputs."""

    whose = "the student's own attention's"


class Replace(Stage):
    """Progressive replacement: turns further attention layers of the current student into mixers (arXiv 2408.15237).

    The mixers are initialised in closed form, as in `initialise`."""

    trains = False
    records = True
    changes_layout = True

    class Options(Further, Initialise.Options):
        """Options of progressive replacement: which layers, and the calibration of `initialise` on the student's own
        inputs and outputs."""

    options: Options

    def __init__(
        self, teacher: Teacher, student: Student, options: Initialise.Options, transfers: Transfers | None = None
    ) -> None:
        super().__init__(teacher, student, options, transfers)
        self.layout: Layout | None = None
        self.taken: dict[int, nn.Module] = {}  # the replaced attention by layer, until the stage ends

    def become(self, layout: Layout) -> None:
        """Set the layout that the student will have after the stage."""
        self.layout = layout

    def begin(self, calibration: Calibration) -> None:
        source = as_source(self.teacher, self.student)
        mixers = self.make_mixers()
        for layer in mixers:
            self.transfers[layer].set(MADE_FROM, "the student's own attention, as trained by the stages before")
        InitialiseFurther(source, Unplaced(mixers), self.options, self.transfers).begin(calibration)
        self._place(mixers)

    def finish(self, calibration: Calibration) -> None:
        self.taken = {}

    def reinstate(self) -> None:
        self._place(self.make_mixers())
        self.taken = {}

    def make_mixers(self) -> dict[int, Mixer]:
        """Make the new mixers, each from its layer's current attention in the student, and record the transfers."""
        layout = cast(Layout, self.layout)
        layers = further(self.student.layout, layout)
        mixers, transfers = further_mixers(as_source(self.teacher, self.student), layout, self.student.shapes, layers)
        self.transfers.update(transfers)
        return mixers

    def _place(self, mixers: dict[int, Mixer]) -> None:
        self.taken = convert(self.student, cast(Layout, self.layout), mixers)
        join_types(self.student)


def mixers_for(
    teacher: Teacher, student: Student, layout: Layout, options: Initialise.Options, calibration: Calibration
) -> dict[int, Mixer]:
    """Make calibrated mixers for further layers of a student without changing the student.

    Returns:
        the mixers by layer.
    """
    stage = Replace(teacher, student, options)
    stage.become(layout)
    mixers = stage.make_mixers()
    InitialiseFurther(as_source(teacher, student), Unplaced(mixers), options, stage.transfers).begin(calibration)
    return mixers
