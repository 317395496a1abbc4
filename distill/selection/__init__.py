"""Which layers, or heads, stay attention: SCORERS is the table of ways to choose.

A recipe says `pattern: {keep: 0.25, by: recall}` in place of letters, and its run selects before it trains; `distill select`
does the same and shows it. To add a scorer: a file beside this one with a subclass of `Scorer`, its `Options`, and a line in
SCORERS.

What every scorer measures is untrained: a layer's attention is replaced by a window of 64 tokens and 4 sinks (or, with
`stand_in: mixer`, by the recipe's own mixer after its initialise stage), so the recall that a selection predicts is where
training starts, not where it ends.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from distill.errors import UserError, nearest

if TYPE_CHECKING:
    from distill.selection.scorer import Scorer

SCORERS = {
    "uniform": "distill.selection.layers:UniformScorer",
    "recall": "distill.selection.layers:RecallScorer",
    "kl": "distill.selection.layers:DivergenceScorer",
    "task": "distill.selection.layers:TaskScorer",
    "retrieval-heads": "distill.selection.heads:RetrievalHeads",
    "greedy": "distill.selection.greedy:Greedy",
    "gates": "distill.selection.gates:Gates",
}


def scorer_class(name: str) -> "type[Scorer]":
    """The class behind a scorer's name.

    Raises:
        UserError: the name is not in the table.
    """
    if name not in SCORERS:
        raise UserError(f"there is no scorer {name!r}; {nearest(name, SCORERS)}")
    module, _, attribute = SCORERS[name].partition(":")
    return getattr(import_module(module), attribute)
