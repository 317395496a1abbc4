"""The rows of every table: the student, its twin where there is one, the untrained baselines, and the teacher."""

from collections.abc import Callable

from torch import nn

from distill.build import build
from distill.evaluate.baselines import WINDOW, has_window_branch, window_everywhere, window_layout
from students.config import Layout
from teachers.teacher import Teacher

TITLES = {
    "teacher": "teacher",
    "student": "student",
    "twin": "its twin: the windows alone, trained the same",
    "window_layout": "its layout, windows untrained",
    "window_everywhere": f"window {WINDOW} + 4 sinks in every layer, untrained",
}


def rows_of(
    teacher: Teacher, student: Callable[[], nn.Module], layout: Layout, twin: Callable[[], nn.Module] | None
) -> dict[str, Callable[[], nn.Module | None]]:
    """How each row's model is made; untrained ones share the teacher's weights."""
    rows: dict[str, Callable[[], nn.Module | None]] = {"teacher": lambda: None, "student": student}
    if twin is not None and has_window_branch(layout):
        rows["twin"] = twin
    rows["window_layout"] = lambda: build(teacher, window_layout(layout))[0]
    rows["window_everywhere"] = lambda: build(teacher, window_everywhere(layout))[0]
    return rows
