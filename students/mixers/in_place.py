"""What a mixer does with one token on a state that a `Decoder` holds in place: the part of the contract that has defaults.

`hold` lays a state so that a token changes it where it is, `token` takes one token, and `give_back` leaves what ordinary
calls would have left. A mixer that says nothing here runs the three steps of any call.
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
    """Base of `Mixer`, which has what is named here."""

    project: Callable[..., Any]
    mix: Callable[..., Tensor]
    features: Callable[..., Tensor]
    out: Callable[..., Tensor]
    _heard: Callable[..., Tensor]
    _branches: Callable[[], Iterable[nn.Module]]

    def token(
        self, entering: Entering, context: Context, residual: Float[Tensor, "b 1 d"] | None = None
    ) -> Float[Tensor, "b 1 d"]:
        """One token on a state that a `Decoder` holds in place: nothing is copied, and few kernels run.

        Args:
            entering: the slot's input, its norm perhaps still to come. residual: what the output is added to.
        """
        with loaded(self._branches()):
            entering.prime(self.entries())
            return self.token_out(self._heard(self.token_features(entering, context)), residual)

    def entries(self) -> list[Entry]:
        """What of the input's projections `token_features` reads from `entering`, in one product."""
        return []

    def token_features(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 k p"]:
        """What the output projection sees of one token in place; by default as of any number of tokens."""
        return self.features(self.mix(self.project(entering.h, context), context), entering.h)

    def token_out(
        self, features: Float[Tensor, "b 1 k p"], residual: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b 1 d"]:
        """The output projection of one token in place, added to `residual`."""
        out = self.out(features)
        return out if residual is None else residual + out

    def hold(self, state: MixerState | ScopedState, turn: Turn, tokens: int) -> None:
        """Lay what this mixer itself (not its parts) keeps in `state` so that a token changes it in place, as rings where it
        moves with the text; for so many tokens to come. By default it stays as it is."""

    def give_back(self, state: MixerState | ScopedState, turn: Turn, steps: int) -> None:
        """Undo `hold`, so many tokens later: leave what ordinary calls leave."""
