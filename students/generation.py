"""Generation with a `Decoder` inside transformers' `generate`, for students, teachers and other causal language models.

student.generate(**inputs, max_new_tokens=256, custom_generate=students.replayed)
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerationMode

from students.compat import CACHE, pad_token, prefill
from students.decoding import Decoder
from students.prompts import generated_prompt, new_cache
from students.prompts import prefill as prompt_logits
from students.rotary import LengthRules
from students.shapes import Float, Int
from students.static_cache import GraphError


def replayed(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "b t"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "b s"]:
    """Greedy or sampled generation with a `Decoder`: `model.generate(..., custom_generate=students.replayed)`.

    transformers passes no streamer to a custom function; use `functools.partial(students.replayed, streamer=streamer)`.
    A cache is always used, also where training has left `use_cache: false` in a model's config.json. Memory is taken for all
    of `max_new_tokens` (or `max_length`); it costs no time where attention reads keys in place.

    Raises:
        ValueError: a mode other than greedy search or sampling, `return_dict_in_generate`, or positions that do not follow
            from the attention_mask. GraphError: see `Decoder`.
    """
    for name, wanted in (("num_beams", 1), ("return_dict_in_generate", False)):
        if getattr(generation_config, name) not in (wanted, None):
            raise ValueError(f"students.replayed cannot use {name}={getattr(generation_config, name)}; set it to {wanted}")
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"students.replayed does greedy search and sampling, not {mode.value}; leave out custom_generate")
    mask, positions, decoder = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), None
    latest = input_ids.shape[1] - 1 if mask is None else mask.sum(1) - 1
    if positions is not None and bool((positions[..., -1] != latest).any()):
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "a row of the attention_mask ends in padding, after which this model cannot continue; pad on the left"
            )
        raise ValueError("students.replayed counts positions by the attention_mask; leave out position_ids")
    rules = LengthRules.of(model.config)
    model_kwargs["use_cache"] = True
    if model_kwargs.get(CACHE) is None:
        model_kwargs[CACHE] = new_cache(model)
    own = partial(prefill, model, input_ids, generation_config, model_kwargs)
    if hasattr(model, "new_cache"):  # a student has its own `_prefill`
        out = own()
    else:
        out = generated_prompt(model, own, input_ids, generation_config, model_kwargs, partial(new_cache, model))
    model_kwargs[CACHE] = getattr(out, CACHE)  # a new cache, where the given one was out of date
    logits = cast(Any, out).logits[:, -1].clone()  # a copy, so that the logits of the whole prompt are freed
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    try:
        while True:
            scores = logits_processor(cast(Any, input_ids), logits.to(input_ids.device, torch.float32, copy=True))
            token = _choice(scores, generation_config.do_sample)
            if ends and (padding := pad_token(generation_config)) is not None:
                token = token * unfinished + padding.to(token.device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            if not unfinished.any():
                break
            if decoder is None or not decoder.left:
                _given_back(decoder)
                decoder, cache = None, model_kwargs[CACHE]
                seen = cache.get_seq_length()
                held = None if mask is None else nn.functional.pad(mask, (0, seen - mask.shape[1]), value=1)
                longest = seen if held is None else int(held.sum(1).max())
                room, left = rules.room(longest), generation_config.max_length - input_ids.shape[1]
                if room == 0:  # from this token on the whole sequence is rotated differently
                    if input_ids.shape[1] != seen + 1:
                        raise GraphError(f"{rules.refusal(longest, 1)}, but input_ids do not hold the whole sequence")
                    logits = _anew(model, input_ids, held, model_kwargs)
                    continue
                decoder = Decoder(model, cache, left if room is None else min(left, room), held)
            logits = decoder(token[:, None])
    finally:
        _given_back(decoder)
    if streamer is not None:
        streamer.end()
    return input_ids


def _given_back(decoder: Decoder | None) -> None:
    if decoder is not None:
        decoder.release()


def _anew(
    model: PreTrainedModel, input_ids: Int[Tensor, "b s"], mask: Int[Tensor, "b past"] | None, model_kwargs: dict
) -> Float[Tensor, "b v"]:
    """The logits after a sequence that is computed from its beginning into a new cache."""
    model_kwargs[CACHE] = new_cache(model)
    mask = None if mask is None else nn.functional.pad(mask, (0, 1), value=1)
    return prompt_logits(model, input_ids, model_kwargs[CACHE], mask)


def _choice(scores: Float[Tensor, "b v"], sample: bool) -> Int[Tensor, " b"]:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0] if sample else scores.argmax(-1)
