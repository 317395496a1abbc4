"""Decoding token by token with static tensors, so that a GPU can replay the forward pass of a token as one CUDA graph.

The forward pass of one token is about a thousand small operations, and in small models launching them takes most of the
time. A `Decoder` takes a cache that holds the prompt, gives every tensor that a token reads or writes a fixed place in
memory, and captures the forward pass once. Each token is then one launch. Without a GPU the same code runs without a graph.
`students.replayed` uses a `Decoder` inside transformers' `generate`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from students.backbone import fused
from students.cache import MixerState, Turn
from students.capturing import explained, no_autocast_cache, side_stream, watched
from students.compat import CACHE, attention_implementation, experts_for_decoding
from students.cuts import embeddings_of
from students.held_keys import Held, Unserved
from students.inputs import Inputs
from students.rotary import LengthRules
from students.shapes import Bool, Float, Int
from students.skeleton import Student
from students.static_cache import GraphError, Ring, StaticKeys, StaticState

OWN_MASKS = ("bloom", "gpt_neo")  # model types that would take the ring's size for the sequence's length
_log = logging.getLogger(__name__)
KINDS = {False: "full_attention", True: "sliding_attention"}  # keys of a model's masks, by whether the layer has a window


class Decoder:
    """Next-token logits, token by token, after the prompt in a cache; the decoder holds the cache until `release`.

    Args:
        model: a student, or another causal language model of transformers whose attention takes a 4-D mask. cache: its
            cache, with a prompt of one token or more (`new_cache()`, or `DynamicCache(config=model.config)`); until
            `release` nothing else may use it. tokens: the most tokens that will be decoded; a larger number takes more
            memory, but no time. attention_mask: the prompt's, if it is padded on either side or inside. graph: whether to
            capture a CUDA graph (default: on a GPU). Capture in one thread at a time, with autocast and inference mode as in
            later calls.

    Raises:
        GraphError: a cache layer or an attention that cannot be held in place; a forward pass that waits for the GPU and so
            cannot be captured; or a length at which the rotary embedding changes for the whole sequence
            (`students.rotary`). The cache is unchanged.
        ValueError: an empty cache, `tokens` below 1, a mask that is not the prompt's, or `graph` without a GPU.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        tokens: int,
        attention_mask: Int[Tensor, "b s"] | None = None,
        *,
        graph: bool | None = None,
    ) -> None:
        self.model, self.cache, self.left = model, cache, tokens
        self.tokens, self.released = tokens, False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.states: list[StaticState] = []
        self._held: Held | None = None
        _check_text(cache, tokens, attention_mask)
        kinds = _check_layers(model, cache)
        if attention_mask is not None and hasattr(model, "check_windows"):
            cast(Student, model).check_windows(attention_mask, tokens)
        if refusal := LengthRules.of(model.config).refusal(_longest(cache, attention_mask), tokens):
            raise GraphError(refusal)
        try:
            self._hold(kinds, tokens, attention_mask, graph)
        except BaseException:
            self.release()
            raise

    def _hold(self, kinds: set[int | None], tokens: int, attention_mask: Tensor | None, graph: bool | None) -> None:
        """Move the cache into static tensors, and capture the graph."""
        model, cache = self.model, self.cache
        first = next(part for layer in cache.layers for part in _tensors(cast(MixerState | DynamicLayer, layer)))
        rows, device = first.shape[0], first.device
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        real = self._place(attention_mask, tokens)
        seen = self._whole.get_seq_length()
        self.column = torch.full((1,), seen, device=device)
        self._unread = torch.ones(rows, 1, 1, 1, dtype=torch.bool, device=device)
        self.rings = {window: Ring(window, seen, tokens, real, device) for window in kinds}
        self.turn = Turn(seen, self.column)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, MixerState):
                self.states.append(StaticState(layer, cast(Student, model).mixers[index], tokens, self.turn))
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicLayer):
                cache.layers[index] = StaticKeys(layer, self.rings[getattr(layer, "sliding_window", None)])
        held = [layer for layer in cache.layers if isinstance(layer, StaticKeys)]
        self._held, self._tried = (Held(held), False) if held else (None, True)
        if device.type == "cuda" if graph is None else graph:
            self._capture(device)

    def _first(self) -> Float[Tensor, "b v"]:
        """The first token: kept attention uses `held_keys.attend`, or the model's own attention if a layer cannot use it."""
        with self._undone(unless=lambda: self._held is not None):
            try:
                logits = self._step()
            except Unserved as reason:
                _log.info("%s decodes with its own attention: %s", type(self.model).__name__, reason)
                self._held = None
            else:
                self._held = self._held if self._held is not None and self._held.all_asked() else None
        self._tried = True
        return self._step() if self._held is None else logits

    @torch.no_grad()
    def __call__(self, token: Int[Tensor, "b 1"]) -> Float[Tensor, "b v"]:
        """The logits of the token after this one.

        Raises:
            ValueError: more than `tokens` calls, or a call after `release`.
        """
        if self.released:
            raise ValueError("this decoder has given its cache back (release); make a new Decoder")
        if not self.left:
            raise ValueError(f"the {self.tokens} tokens of this decoder are used up; make a new Decoder with more tokens")
        self.token.copy_(token)
        if self.graph is None:
            logits = self._step() if self._tried else self._first()
        else:
            self.graph.replay()
            logits = self._logits.clone()
        self.left -= 1
        for state in self.states:
            state.count()
        for ring in self.rings.values():
            ring.count()
        return logits

    @torch.no_grad()
    def release(self) -> None:
        """Give the cache back with all tokens so far, as after ordinary calls; the decoder cannot be used any more."""
        for state in self.states:
            state.give_back()
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, StaticKeys):
                self.cache.layers[index] = layer.given_back()
        self.states, self.left, self.graph, self.released = [], 0, None, True

    def _place(self, attention_mask: Int[Tensor, "b s"] | None, tokens: int) -> Bool[Tensor, "b columns"] | None:
        """Set `position` and the cache as the model's own layers see them.

        Returns:
            which columns, later ones included, are tokens and not padding; None where all are.
        """
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if attention_mask is None:
            position, mask = torch.full_like(self.token, self.cache.get_seq_length()), None
        else:
            attention_mask = attention_mask.to(self.token.device)
            position, mask = attention_mask.sum(1, keepdim=True), nn.functional.pad(attention_mask, (0, 1), value=1)
        inputs = Inputs(self.token, None, mask, position.long(), self.cache)
        inputs = cast(Student, self.model).behind(inputs) if hasattr(self.model, "behind") else inputs
        self.position, self._whole = cast(Tensor, inputs.position_ids), cast(Cache, inputs.cache)
        mask = inputs.attention_mask
        return None if mask is None else nn.functional.pad(mask.bool(), (0, tokens - 1), value=True)

    def _step(self) -> Float[Tensor, "b v"]:
        """The logits after `self.token`. On a GPU nothing here may copy a value to the CPU."""
        for ring in self.rings.values():
            ring.turn(self.column)
        config = self.model.config.get_text_config(decoder=True)
        self.turn.open = True
        try:
            with fused(self.model), nullcontext() if self._held is None else self._held.serving(config):
                logits = self._forward()
        finally:
            self.turn.open = False
            for ring in self.rings.values():
                ring.close()
        self.position.add_(1)
        self.column.add_(1)
        return logits

    def _forward(self) -> Float[Tensor, "b v"]:
        if self._held is None and self.rings:
            masks = {KINDS[ring.window is not None]: self._mask(ring.visible()) for ring in self.rings.values()}
        else:  # a placeholder that is not read: without a mask the skeleton would make one
            masks = {KINDS[window is not None]: self._unread for window in self.rings or [None]}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        if hasattr(self.model, "next_logits"):
            return cast(Student, self.model).next_logits(self.token, self.position, mask, self._whole)
        where = {"attention_mask": mask, "position_ids": self.position, CACHE: self._whole, "use_cache": True}
        return self.model(input_ids=self.token, **where).logits[:, -1]

    def _mask(self, visible: Bool[Tensor, "rows size"]) -> Float[Tensor, "b 1 1 size"]:
        """An additive mask, 0 at visible places, which transformers passes on unchanged.

        SDPA would convert a Boolean mask in each layer.
        """
        numbers = embeddings_of(self.model).dtype
        mask = torch.zeros(len(self.token), 1, 1, visible.shape[1], dtype=numbers, device=visible.device)
        return mask.masked_fill_(~visible[:, None, None], torch.finfo(numbers).min)

    def _capture(self, device: torch.device) -> None:
        """Warm up, check that nothing waits for the GPU, and capture one token.

        All three passes use the first token's column, which that token overwrites later.
        """
        stream = side_stream(device)
        caller = torch.cuda.current_stream(device)
        stream.wait_stream(caller)
        experts = experts_for_decoding(self.model)
        with torch.cuda.stream(stream), experts, no_autocast_cache():
            try:
                with self._undone():  # kernels compile and libraries allocate
                    self._step() if self._tried else self._first()
                with self._undone(), watched(self.model):
                    self._step()
                graph = torch.cuda.CUDAGraph()
                recorded = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
                with self._undone(), explained(self.model), recorded:
                    self._logits = self._step()
            finally:
                caller.wait_stream(stream)  # not the current stream here: restored tensors must be complete
        self.graph = graph

    @contextmanager
    def _undone(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Restore after the block what a token has written, except keys and values, which the next token overwrites."""
        written = [self.position, self.column, *(part for state in self.states for part in state.tensors.values())]
        before = [part.clone() for part in written]
        try:
            yield
        finally:
            for part, old in () if unless() else zip(written, before, strict=True):
                part.copy_(old)


def _check_text(cache: Cache, tokens: int, attention_mask: Tensor | None) -> None:
    seen = cache.get_seq_length()
    if not seen or tokens < 1:
        raise ValueError(
            f"a Decoder continues a prompt: the cache holds {seen} tokens, and tokens is {tokens}; both should be 1 or more"
        )
    if attention_mask is not None and (attention_mask.shape[1] != seen or not bool(attention_mask.any(1).all())):
        raise ValueError(
            f"the attention_mask must cover the {seen} tokens in the cache, with at least one token in every row"
        )


def _longest(cache: Cache, attention_mask: Tensor | None) -> int:
    return cache.get_seq_length() if attention_mask is None else int(attention_mask.sum(1).max())


def _check_layers(model: PreTrainedModel, cache: Cache) -> set[int | None]:
    """The window sizes of the attention layers in a cache; None for a layer without a window.

    Raises:
        GraphError: naming the layer or attention that cannot be held in place.
    """
    config = model.config.get_text_config(decoder=True)
    if config.model_type in OWN_MASKS:
        raise GraphError(f"{type(model).__name__} makes its own masks from the cache's length; decode without a Decoder")
    expected, windows = DynamicCache(config=config).layers, set()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MixerState):
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or type(layer) is not type(expected[index]):
            raise GraphError(
                f"layer {index} of the cache is a {type(layer).__name__}, which cannot be held in place; make the cache "
                "with new_cache() or DynamicCache(config=model.config), or decode without a Decoder"
            )
        windows.add(getattr(layer, "sliding_window", None))
    unknown = set(getattr(config, "layer_types", None) or ()) - set(KINDS.values())
    implementation = attention_implementation(config)
    if windows and (unknown or len(windows - {None}) > 1 or implementation not in ("sdpa", "eager")):
        sizes = sorted(window for window in windows if window is not None)
        what = f"windows of {sizes} tokens under {implementation} attention"
        what = f"layers of type {min(unknown)}" if unknown else what
        raise GraphError(f"{type(model).__name__} has {what}, which cannot be held in place; decode without a Decoder")
    return windows


def _tensors(layer: MixerState | DynamicLayer) -> list[Tensor]:
    return list(layer.tensors.values()) if isinstance(layer, MixerState) else [cast(Tensor, layer.keys)]
