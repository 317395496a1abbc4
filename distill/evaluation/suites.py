"""The tables of evaluations and of suites.

To add an evaluation, write a file next to this one with an `Evaluation`, and add a line to EVALUATIONS, whose order is that
of the tables.
"""

from dataclasses import replace
from importlib import import_module

from distill.errors import UserError, nearest
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.questions import TASKS
from distill.evaluation.suite import EVERYTHING, SIX, Suite
from distill.recipe import EvaluationOptions

EVALUATIONS = {
    "fidelity": "distill.evaluation.fidelity:Fidelity",
    "passkey": "distill.evaluation.recall:Passkey",
    "recall": "distill.evaluation.recall:Recall",
    "tasks": "distill.evaluation.tasks:Tasks",
    "speed": "distill.evaluation.speed:Speed",
}


def evaluation(name: str) -> Evaluation:
    """Return the evaluation of that name."""
    module, _, attribute = EVALUATIONS[name].partition(":")
    return getattr(import_module(module), attribute)()


def _filled(suite: Suite) -> Suite:
    """Return a suite with the evaluations that name it."""
    every = {name: evaluation(name) for name in EVALUATIONS}
    run = tuple(name for name, one in every.items() if suite.name in one.suites)
    baselines, knockouts = (
        tuple(name for name in run if suite.name in getattr(every[name], kind)) for kind in ("baselines", "knockouts")
    )
    return replace(suite, evaluations=run, baselines=baselines, knockouts=knockouts)


SIZES = (
    Suite(
        name="quick",
        heldout_tokens=8192,
        window=256,
        passkey=(256, 512, 1024),
        passkey_trials=4,
        tasks=SIX,
        items=50,
    ),
    Suite(
        name="standard",
        passkey=(512, 1024, 2048, 4096),
        passkey_trials=10,
        recall=(512, 1024, 2048, 4096),
        recall_trials=10,
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),
        grid_trials=4,
        tasks=SIX,
        speed=(1024, 2048, 4096, 8192, 16_384, 32_768),
    ),
    Suite(
        name="full",
        heldout_tokens=EVERYTHING,
        passkey=(512, 1024, 2048, 4096, 8192, 16_384, 32_768),
        passkey_trials=20,
        recall=(512, 1024, 2048, 4096, 8192, 16_384, 32_768),
        recall_trials=20,
        depths=(0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
        grid_trials=10,
        tasks=tuple(TASKS),
        speed=(1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072),
        batches=(1, 8),
    ),
)
SUITES = {suite.name: _filled(suite) for suite in SIZES}


def find_suite(name: str) -> Suite:
    """Return the suite of that name.

    Raises:
        UserError: no suite has that name.
    """
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}; {nearest(name, SUITES)}")
    return SUITES[name]


def suite_of_run(options: EvaluationOptions) -> Suite:
    """Return the suite that ends a run: fidelity, and passkey recall at the recipe's lengths."""
    return _filled(Suite(name="run", passkey=tuple(options.passkey), passkey_trials=options.passkey_trials))
