"""Direct calls of a student's body (its `base_model`), without the student's own `forward`.

Fused losses make such calls (TRL's trainers, Liger's kernels) and apply the head to the hidden states themselves. `forward`
tells mixers about documents and padding, and adds shared keys and meta tokens. A direct call would silently lack all of
these. A hook on the body therefore prepares the arguments of every call that does not come from the student.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from students.skeleton import Skeleton

CACHES = ("cache", "past_key_values", "layer_past")  # names of the cache argument in bodies
TAKEN = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "document_ids", "use_cache")

_inside: ContextVar[bool] = ContextVar("a student's own call of its body", default=False)


@contextmanager
def own_call() -> Iterator[None]:
    """Inside the block, calls of the body come from the student, with prepared inputs."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


class WatchedBody(Skeleton):
    """Part of the student's class, whose `entered` is a context that yields the body's arguments for some inputs."""

    def watch_body(self) -> None:
        """Put the hook on the body."""
        self.base_model.register_forward_pre_hook(self._before_body, with_kwargs=True)

    def _before_body(self, body: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict] | None:
        """Prepare the arguments of a direct call; the preparation is undone when the call ends."""
        if _inside.get():
            return None
        given = _by_name(body, args, keywords)
        caches = [given.pop(name, None) for name in CACHES]
        inputs: dict[str, Any] = {name: given.pop(name, None) for name in TAKEN}
        stack = ExitStack()
        ready = stack.enter_context(self.entered(cache=next((each for each in caches if each is not None), None), **inputs))

        def leave(*call) -> None:
            handle.remove()
            stack.close()

        handle = body.register_forward_hook(leave, always_call=True)
        return (), ready | given


def _by_name(body: nn.Module, args: tuple, keywords: dict) -> dict[str, Any]:
    bound = inspect.signature(type(body).forward).bind(body, *args, **keywords)
    given = dict(list(bound.arguments.items())[1:])
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given
