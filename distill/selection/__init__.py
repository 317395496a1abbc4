"""Selection of the layers or heads that stay attention. SCORERS is the table of methods.

A recipe has `pattern: {keep: 0.25, by: recall}` in place of letters. Its run then selects the layers before it trains;
`distill select` makes the same selection and shows it. To add a scorer, write a file in this folder with a subclass of
`Scorer` and its `Options`, and add a line to SCORERS.

Every scorer measures untrained models: a layer's attention is replaced by a window of 64 tokens and 4 sinks, or, with
`stand_in: mixer`, by the recipe's own mixer after its initialise stage. The recall that a selection predicts is therefore
that at the start of training, not at its end.
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
    """The class of a scorer, by its name in the table.

    Raises:
        UserError: the name is not in the table.
    """
    if name not in SCORERS:
        raise UserError(f"there is no scorer {name!r}; {nearest(name, SCORERS)}")
    module, _, attribute = SCORERS[name].partition(":")
    return getattr(import_module(module), attribute)
