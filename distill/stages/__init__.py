"""The table of stages. To add one: a file beside this one with a Stage and its Options, and one line here."""

from importlib import import_module

STAGES = {
    "initialise": "distill.stages.initialise:Initialise",
    "orient": "distill.stages.orient:Orient",
    "align": "distill.stages.align:Align",
    "imitate": "distill.stages.imitate:Imitate",
}


def stage_class(name: str) -> type:
    """The class behind a name of the table."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(import_module(module), attribute)


def options_class(name: str) -> type:
    """The schema of a stage's options in a recipe."""
    return stage_class(name).Options
