"""The part of a mixer's contract for one token on a state that a `Decoder` holds in place; all of it has defaults.

`hold` prepares a state so that a token changes its tensors in place, `token` computes one token, and `give_back` restores
the form that ordinary calls give the state. A mixer that overrides nothing here runs the three steps of an ordinary call.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from students.cache import MixerState, ScopedState, Turn
from students.mixers.context import Context
from students.mixers.entering import Entering, Entry
from students.shapes import Float
from students.wrapped import loaded


class InPlace:
    """Base of `Mixer`, which defines the methods declared here."""

    project: Callable[..., Any]
    mix: Callable[..., Tensor]
    features: Callable[..., Tensor]
    out: Callable[..., Tensor]
    _heard: Callable[..., Tensor]
    _branches: Callable[[], Iterable[nn.Module]]

    def token(
        self, entering: Entering, context: Context, residual: Float[Tensor, "b 1 d"] | None = None
    ) -> Float[Tensor, "b 1 d"]:
        """The output for one token on a state that a `Decoder` holds in place, without copies and in few kernels.

        Args:
            entering: the slot's input, before or after its norm. residual: added to the output, if given.
        """
        with loaded(self._branches()):
            entering.prime(self.entries())
            return self.token_out(self._heard(self.token_features(entering, context)), residual)

    def entries(self) -> list[Entry]:
        """The projections that `token_features` reads from `entering`, which are computed in one product."""
        return []

    def token_features(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 k p"]:
        """The output projection's input for one token on a held state; by default from the three steps."""
        return self.features(self.mix(self.project(entering.h, context), context), entering.h)

    def token_out(
        self, features: Float[Tensor, "b 1 k p"], residual: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b 1 d"]:
        """The output projection of one token, added to `residual`."""
        out = self.out(features)
        return out if residual is None else residual + out

    def hold(self, state: MixerState | ScopedState, turn: Turn, tokens: int) -> None:
        """Prepare this mixer's own tensors in `state` (not those of its parts) for `tokens` tokens in place.

        Tensors that shift with the sequence become rings. By default nothing is changed.
        """

    def give_back(self, state: MixerState | ScopedState, turn: Turn, steps: int) -> None:
        """Undo `hold` after `steps` tokens: restore the form that ordinary calls give the state."""
