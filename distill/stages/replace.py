"""Replace: more layers of the student as it now is become mixers (progressive replacement).

The Mamba in the Llama (arXiv 2408.15237) converts some layers, distils, and converts more of what came of it: in its
ablation the perplexity was 2.20 step by step, and 2.29 with all of them at once. What the new mixers are made from is the
student's own attention, which the stages before may have trained: its projections (`Mixer.from_attention`), and its inputs
and outputs in the student, on which their constants and output scales are solved as `initialise` solves the first mixers'.

The layers that are there already stay as they are. Stages after it know which ones are new (`layers: new`).
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
    """Mixers that stand in no student yet, as closed-form work asks for a student's."""

    def __init__(self, mixers: dict[int, Mixer]) -> None:
        super().__init__()
        self.mixers = mixers
        self.givers: dict[int, int] = {}


class InitialiseFurther(Initialise):
    """`initialise`, of mixers beside a student and on its own inputs and outputs."""

    whose = "the student's own attention's"


class Replace(Stage):
    """Progressive replacement: turns more attention layers of the student as it is by then into mixers (arXiv 2408.15237).

    Its work is closed-form, as that of `initialise`."""

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
        self.taken: dict[int, nn.Module] = {}  # the attention that stood in its layers, until it ends

    def become(self, layout: Layout) -> None:
        """Take the layout that the student is to have."""
        self.layout = layout

    def begin(self, calibration: Calibration) -> None:
        source = as_source(self.teacher, self.student)
        mixers = self.make_mixers()
        for layer in mixers:
            self.transfers[layer].set(MADE_FROM, "the student's own attention, as the stages before left it")
        InitialiseFurther(source, Unplaced(mixers), self.options, self.transfers).begin(calibration)
        self._place(mixers)

    def finish(self, calibration: Calibration) -> None:
        self.taken = {}

    def reinstate(self) -> None:
        self._place(self.make_mixers())
        self.taken = {}

    def make_mixers(self) -> dict[int, Mixer]:
        """The new mixers, each made from its layer's attention as it stands in the student, and recorded."""
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
    """Calibrated mixers for further layers of a student, which is left as it is.

    Returns:
        them, by layer.
    """
    stage = Replace(teacher, student, options)
    stage.become(layout)
    mixers = stage.make_mixers()
    InitialiseFurther(as_source(teacher, student), Unplaced(mixers), options, stage.transfers).begin(calibration)
    return mixers
