"""A student's changes to transformers' `generate`: its cache, prompts that end in padding, and long prompts in chunks."""

from functools import partial
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from students.compat import CACHE
from students.padding import last_columns
from students.prompts import generated_prompt
from students.rotary import lengths
from students.shapes import Int
from students.skeleton import Skeleton


class Generating(Skeleton):
    """Part of the student's class: overrides methods of transformers' GenerationMixin."""

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *more: Any, **options: Any
    ) -> Any:
        """transformers' `generate`, with a cache unless this call or its `generation_config` says otherwise.

        Training may have left `use_cache: false` in config.json and generation_config.json. Generation would then compute
        the whole sequence for every token.
        """
        if generation_config is None or generation_config.use_cache is None:
            options.setdefault("use_cache", True)
        return super().generate(inputs, generation_config, *more, **options)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *unused: Any, **more: Any
    ) -> Any:
        """Called by `generate` (transformers 5.17, 5.24), whose own cache would have no places for the states."""
        self._prepare_ends(generation_config, model_kwargs)
        if generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} cannot hold a student's states; "
                "leave it unset"
            )
        model_kwargs[CACHE] = self.new_cache()

    def _prefill(
        self, input_ids: Int[Tensor, "b s"], generation_config: GenerationConfig, model_kwargs: dict, *more, **rest
    ):
        """Called by `generate` (transformers 5.17, 5.24) for the prompt, which is computed in chunks.

        A mask without padding is dropped afterwards: reading it at every token would wait for the GPU.
        """

        own = partial(super()._prefill, input_ids, generation_config, model_kwargs, *more, **rest)
        out = generated_prompt(self, own, input_ids, generation_config, model_kwargs, self.new_cache)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and model_kwargs.get(CACHE) is not None and bool(mask.all()):
            model_kwargs["attention_mask"] = None
        return out

    def prepare_inputs_for_generation(
        self, input_ids: Int[Tensor, "b s"], *more: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict:
        """transformers' method, without a cache that is out of date: the whole sequence is then computed into a new one.

        `generate` (5.17, 5.24) inspects this signature: `kwargs` permits arguments of `forward`, and `inputs_embeds` permits
        embeddings.
        """
        cache, positions = kwargs.get(CACHE), kwargs.get("position_ids")
        past = cache.get_seq_length() if self.length_rules and cache is not None else 0
        total = input_ids.shape[1] if positions is None else positions.shape[-1]
        if past and total == input_ids.shape[1] > past:
            positions = None if positions is None else positions[..., past:].expand(len(input_ids), -1)
            before, after = lengths(past, total - past, positions, kwargs.get("attention_mask"))
            if self.length_rules.refusal(before, after - before):
                kwargs |= {CACHE: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, *more, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_ends(self, generation_config: GenerationConfig, model_kwargs: dict) -> None:
        """Let a row that ends in padding continue from its last token's position.

        Raises:
            ValueError: a row has no token in the last chunk, whose logits give the next token.
        """
        mask: Int[Tensor, "b s"] | None = model_kwargs.get("attention_mask")
        if mask is None or not self.layout.converted:
            return
        columns = last_columns(mask.bool())
        if columns is None:
            return
        cache = model_kwargs.get(CACHE)
        new = mask.shape[1] - (0 if cache is None else cache.get_seq_length())
        chunk = generation_config.prefill_chunk_size or new
        last = new % chunk or chunk
        empty = (~mask[:, -last:].bool().any(1)).nonzero()
        if len(empty):
            raise ValueError(
                f"row {int(empty[0])} of the attention_mask has no token among the last {last} columns, the chunk that "
                "gives the next token: pad on the left, or leave out the row, or prefill_chunk_size if it is set"
            )
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            model_kwargs["position_ids"] = positions.expand(len(mask), -1).gather(1, columns.to(positions.device))
