"""Prefill in chunks: a long prompt is computed piece by piece into a cache, so activations need the memory of one chunk.

logits = students.prefill(model, ids, cache)  # of the next token; the cache is as after one call with the whole prompt

The rows of a batch share a chunk, so a larger batch has fewer columns in each. A student's `generate` prefills in chunks by
default; transformers' setting `prefill_chunk_size` changes the number of columns.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from students.compat import CACHE, mask_width
from students.cuts import Prompt, chunk_columns, cuts, embeddings_of
from students.growing_keys import keys_in_place
from students.prompt_attention import prompt_attention, serves
from students.rotary import LengthRules, lengths, turned_as
from students.shapes import Float, Int
from students.skeleton import Student

TAKEN = ("attention_mask", "position_ids", "inputs_embeds", "use_cache", "logits_to_keep", CACHE)  # what chunks support

_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar(
    "the function that gets a prompt's progress", default=None
)


@contextmanager
def watched(tell: Callable[[int, int], None]) -> Iterator[None]:
    """Inside the block, `tell(columns done, columns in all)` is called after each chunk of a prompt."""
    token = _watcher.set(tell)
    try:
        yield
    finally:
        _watcher.reset(token)


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "b t"],
    cache: Cache,
    attention_mask: Int[Tensor, "b s"] | None = None,
    *,
    chunk: int | None = None,
) -> Float[Tensor, "b v"]:
    """Compute a prompt into a cache, chunk by chunk, and return the logits of the next token.

    Args:
        model: a student, or another causal language model of transformers. cache: an empty one (a student's `new_cache()`,
            else `DynamicCache(config=model.config)`), or one that holds tokens already. attention_mask: of the cached tokens
            and the prompt. chunk: columns of a chunk (default: by memory, see `students.cuts`); the resulting cache does not
            depend on it.

    Raises:
        ValueError: `chunk` below 1, `input_ids` that are not [batch, tokens], and the errors of the model's `forward`.
    """
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids has the shape {tuple(input_ids.shape)}; it should be [batch, tokens], as in input_ids[None]"
        )
    asked = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    found = through(
        model,
        _prompt(input_ids, cache, attention_mask),
        cache,
        chunk=chunk,
        end=lambda piece: model(**piece, **asked, return_dict=True),
    )
    return found.logits[:, -1].clone()  # a copy, so that the logits of the whole chunk are freed


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel, input_ids: Int[Tensor, "b t"], cache: Cache, *, last: bool = False, chunk: int | None = None
) -> Float[Tensor, "b s d"]:
    """Compute a prompt into a cache, chunk by chunk; return its last hidden states, with `last` only the last column's."""
    found: list[Tensor] = []

    def take(hidden: Tensor) -> None:
        if last:
            found[:] = [hidden[:, -1:].clone()]
        else:
            found.append(hidden)

    through(model, _prompt(input_ids, cache, None), cache, take, chunk=chunk)
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache of a student, or of another model."""
    if hasattr(model, "new_cache"):
        return cast(Student, model).new_cache()
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def widest_row(model: nn.Module) -> int:
    """The default number of columns of a chunk at batch size 1."""
    own = cast(PreTrainedModel, model)
    weight = embeddings_of(own)
    return chunk_columns(own.config, 1, weight.device, weight.element_size())


def through(
    model: PreTrainedModel,
    prompt: Prompt,
    cache: Cache,
    take: Callable[[Tensor], None] = lambda hidden: None,
    *,
    chunk: int | None = None,
    end: Callable[[dict], Any] | None = None,
) -> Any:
    """Compute a prompt into a cache, chunk by chunk; `take` is called with each chunk's last hidden states.

    Args:
        end: called with the arguments of the last chunk in place of the model; its result is returned.
    """
    pieces, out = cuts(model, prompt, chunk), None
    with _in_pieces(model, prompt, cache) if len(pieces) > 1 else ExitStack():
        for start, stop in pieces:
            arguments = prompt.piece(start, stop) | {CACHE: cache, "use_cache": True}
            if end is not None and stop == prompt.columns:
                out = end(arguments)
            else:
                take(model.base_model(**arguments).last_hidden_state)
            _tell(stop, prompt)
    return out


def generated_prompt(
    model: PreTrainedModel,
    own: Callable,
    input_ids: Int[Tensor, "b s"],
    config: GenerationConfig,
    arguments: dict[str, Any],
    new_cache: Callable[[], Cache],
) -> Any:
    """Prefill for `generate`: computes the prompt into the cache and returns the output of the last chunk.

    Args:
        own: transformers' own prefill, for prompts that cannot be cut. arguments: of `forward`, with a cache; a cache that
            is out of date (see `students.rotary`) is replaced.
    """
    prompt = _of_generate(input_ids, config, arguments)
    if prompt is None:
        return _by_transformers(model, own, config)
    if prompt.past and _out_of_date(model, prompt):
        positions, whole = prompt.position_ids, prompt.past + prompt.columns
        if input_ids.shape[1] != whole or (positions is not None and positions.shape[-1] != whole):
            return _by_transformers(model, own, config)
        arguments[CACHE], prompt = new_cache(), replace(prompt, tokens=input_ids, past=0)
    asked = {name: value for name, value in arguments.items() if name == "logits_to_keep"}
    return through(
        model,
        prompt,
        arguments[CACHE],
        chunk=config.prefill_chunk_size,
        end=lambda piece: model(**piece, **asked, return_dict=True),
    )


def _by_transformers(model: PreTrainedModel, own: Callable, config: GenerationConfig) -> Any:
    if LengthRules.of(model.config):  # a later chunk might change the rotation of earlier ones
        config.prefill_chunk_size = None
    return own()


def _of_generate(input_ids: Tensor, config: GenerationConfig, arguments: dict[str, Any]) -> Prompt | None:
    """The prompt of a `generate`; None where an argument cannot be cut into chunks, or the prompt has no new tokens."""
    cache, mask, positions = (arguments.get(name) for name in (CACHE, "attention_mask", "position_ids"))
    embeds = arguments.get("inputs_embeds")
    unknown = [name for name, value in arguments.items() if name not in TAKEN and value is not None and value is not False]
    if cache is None or unknown or (embeds is not None and input_ids.shape[1]):
        return None
    tokens, past = input_ids if embeds is None else embeds, cache.get_seq_length()
    total = mask_width(config, mask) or tokens.shape[1]
    if past and tokens.shape[1] == total:
        tokens = tokens[:, past:]
    if not tokens.shape[1] or (mask is not None and mask.shape != (tokens.shape[0], past + tokens.shape[1])):
        return None
    if positions is not None and positions.shape[-1] < tokens.shape[1]:
        return None
    return Prompt(tokens, past, mask, positions)


def _out_of_date(model: PreTrainedModel, prompt: Prompt) -> bool:
    rules = LengthRules.of(model.config)
    return bool(rules) and rules.refusal(*_grown(prompt)) is not None


def _grown(prompt: Prompt) -> tuple[int, int]:
    """The length of the longest row before the prompt, and by how many tokens it grows."""
    positions = prompt.position_ids
    positions = None if positions is None else positions[..., -prompt.columns :].expand(prompt.rows, -1)
    before, after = lengths(prompt.past, prompt.columns, positions, prompt.attention_mask)
    return before, after - before


def _prompt(input_ids: Tensor, cache: Cache, mask: Tensor | None) -> Prompt:
    past = cache.get_seq_length()
    if mask is not None and bool(mask.all()):
        mask = None
    positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    return Prompt(input_ids, past, mask, positions)


@contextmanager
def _in_pieces(model: PreTrainedModel, prompt: Prompt, cache: Cache) -> Iterator[None]:
    """Inside the block, calls of the model are chunks of one prompt: attention, cache and rotary embedding are set up."""
    meta_tokens = 0 if prompt.past else getattr(cache, "meta_tokens", 0)
    with ExitStack() as stack:
        if serves(model, prompt.attention_mask):
            stack.enter_context(prompt_attention(model))
        stack.enter_context(keys_in_place(cache, meta_tokens + prompt.columns))
        if rules := LengthRules.of(model.config):
            before, more = _grown(prompt)
            if prompt.past and (refusal := rules.refusal(before, more)):
                raise ValueError(refusal)
            stack.enter_context(turned_as(model, before + more))
        yield


def watcher() -> Callable[[int, int], None] | None:
    """The function that `watched` has set; None outside."""
    return _watcher.get()


def _tell(done: int, prompt: Prompt) -> None:
    tell = watcher()
    if tell is None:
        return
    if prompt.tokens.device.type == "cuda":
        torch.cuda.synchronize(prompt.tokens.device)
    tell(done, prompt.columns)
