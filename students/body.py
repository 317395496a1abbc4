"""Calls of a student's body that pass by its `forward`, as code makes them that puts the head on hidden states itself.

Fused losses do so (TRL's trainers, Liger's kernels). What `forward` reads off its inputs, the documents and padding that
mixers must know, and what it brings, keys to share and meta tokens, would not be there, and nothing would say so. The body
is therefore watched: a call that does not come from the student gets what `forward` would have given it.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from students.skeleton import Skeleton

CACHES = ("cache", "past_key_values", "layer_past")  # what bodies call their cache
TAKEN = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "document_ids", "use_cache")

_inside: ContextVar[bool] = ContextVar("a student's own call of its body", default=False)


@contextmanager
def own_call() -> Iterator[None]:
    """Inside the block, the body is called by the student, with inputs that are ready."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


class WatchedBody(Skeleton):
    """For the student's class, which has `entered`: a context that yields the body's arguments for some inputs."""

    def watch_body(self) -> None:
        """Watch the body, once it is there."""
        self.base_model.register_forward_pre_hook(self._before_body, with_kwargs=True)

    def _before_body(self, body: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict] | None:
        """What the body is called with, made ready where it was called from elsewhere; undone when the call has ended."""
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
