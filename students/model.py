"""Students: the teacher's own transformers class, with mixers where some layers had attention.

For a family such as `llama` there is a config class with model_type `distill_llama` and a model class beside it, both
subclasses of transformers' own, made when first asked for. Weights that are not converted keep their names.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from students.cache import MixerState
from students.compat import (
    CACHE,
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    attention_implementation,
    set_attention_implementation,
)
from students.config import Layout, Place, Shapes, from_dict, to_dict
from students.generating import Generating
from students.inputs import Inputs, checked
from students.kernels.documents import marked_positions
from students.meta_tokens import MetaTokens, TextCache
from students.mixers.mixer import Mixer, SharedKeys
from students.padding import Unpadded, check_windows, ends_filled
from students.rotary import LengthRules, forget_lengths, lengths
from students.shapes import Float, Int
from students.shared_keys import check_shared_keys
from students.slot import MixerSlot

PREFIX = "distill_"


class StudentMixin(Generating):
    """What a student adds to its skeleton class: slots, their documents, and a cache that fits them."""

    # A recurrent state cannot be rolled back: assisted generation refuses with a clear error (transformers 5.17, 5.24).
    _is_stateful = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.layout, self.place, shapes = from_dict(config.distill)
        layers = self.get_submodule(self.place.layers)
        self.givers = self.layout.givers
        keys_of = {giver: giver for giver in self.givers.values()} | self.givers
        for index in self.layout.converted:
            mixer = self.layout.make(index, shapes.at(index))
            slot = MixerSlot(mixer, index, self.place.documents, keys_of.get(index))
            setattr(layers[index], self.place.name, slot)
        mixers = self.mixers
        for owner, *others in self.layout.groups:
            for layer in others:
                mixers[layer].tie(mixers[owner])
        check_shared_keys(self.mixers, self.givers, shapes, self.place)
        # transformers (5.17, 5.24) gives each model a set of its own in `post_init`, and reads it when weights are loaded.
        self._keep_in_fp32_modules_strict |= self.float32_names
        count = self.layout.meta_tokens
        self.length_rules = LengthRules.of(config)
        forget_lengths(self)
        width, before_zero = self.get_input_embeddings().embedding_dim, bool(self.length_rules)
        self.meta_tokens = MetaTokens(count, width, before_zero=before_zero) if count else None

    @property
    def mixers(self) -> dict[int, Mixer]:
        """The mixers by layer."""
        layers = self.get_submodule(self.place.layers)
        return {index: getattr(layers[index], self.place.name).mixer for index in self.layout.converted}

    @property
    def float32_names(self) -> set[str]:
        """Names of parameters, buffers and modules that its mixers, and what these are made of, keep in float32."""
        parts = [part for mixer in self.mixers.values() for part in mixer.modules() if isinstance(part, Mixer)]
        return set().union(*(part.float32 for part in parts))

    def mixer_prefix(self, layer: int) -> str:
        """What the names of a layer's mixer parameters begin with."""
        return f"{self.place.layers}.{layer}.{self.place.name}.mixer."

    @property
    def own_prefixes(self) -> tuple[str, ...]:
        """What the names of all parameters and buffers begin with that the skeleton does not have."""
        return (*(self.mixer_prefix(layer) for layer in self.layout.converted), "meta_tokens.")

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **rest,
    ):
        """The skeleton's forward; packed documents come as `document_ids` or as `position_ids` that start again.

        The cache may be called `cache` or `past_key_values` in any version of transformers.

        Raises:
            ValueError: inputs that slots cannot honour (see `inputs.checked`), or a cache that is out of date behind a
                length at which the rotary embedding changes.
        """
        cache = past_key_values if cache is None else cache
        self._check_cache(cache)
        inputs = checked(input_ids, inputs_embeds, attention_mask, position_ids, cache, document_ids)
        self._check_length(inputs)
        if cache is None and self._caches(inputs, use_cache):
            inputs = replace(inputs, cache=self.new_cache())
        use_cache = inputs.cache is not None and use_cache is not False
        rest["logits_to_keep"] = logits_to_keep  # named above: `generate` asks for the last token's alone where it can
        with self._prefixed(inputs) as prefixed, self._ends_filled(inputs):
            return super().forward(**self._arguments(prefixed, use_cache), **rest)

    def hidden(
        self, input_ids: Int[Tensor, "b t"], document_ids: Int[Tensor, "b t"] | None, cache: Cache | None = None
    ) -> Float[Tensor, "b t d"]:
        """The last hidden states, what the head would turn into logits; with a cache, of the tokens behind it."""
        with self._prefixed(checked(input_ids, cache=cache, document_ids=document_ids)) as inputs:
            return self.base_model(**self._arguments(inputs, cache is not None)).last_hidden_state

    def next_logits(
        self, token: Int[Tensor, "b 1"], positions: Int[Tensor, "b 1"], mask: Tensor | dict[str, Tensor], cache: Cache
    ) -> Float[Tensor, "b v"]:
        """What follows one token behind a cache, with nothing checked that the GPU would have to be waited for.

        Args:
            positions, mask, cache: as the skeleton takes them (see `behind`), the mask one that it uses as it is.
        """
        arguments = self._arguments(Inputs(token, None, None, positions, cache), True)
        return super().forward(**arguments | {"attention_mask": mask}).logits[:, -1]

    def behind(self, inputs: Inputs) -> Inputs:
        """A call's mask, positions and cache as the skeleton takes them, where the cache has begun."""
        with self._prefixed(inputs) as inputs:
            return inputs

    def new_cache(self) -> Cache:
        """An empty cache: a `MixerState` for each slot, transformers' own layer for each kept attention."""
        layers = DynamicCache(config=self.config.get_text_config(decoder=True)).layers
        layers = [MixerState() if i in self.layout.converted else layer for i, layer in enumerate(layers)]
        return Cache(layers=layers) if self.meta_tokens is None else TextCache(layers, self.meta_tokens.count)

    def _check_cache(self, cache: Cache | None) -> None:
        """Refuse a cache without places for the slots' states; that of meta tokens is checked where they are put in."""
        if cache is None or self.meta_tokens is not None:
            return
        states = [isinstance(layer, MixerState) for layer in cache.layers]
        if [index for index, is_state in enumerate(states) if is_state] != self.layout.converted:
            raise ValueError(f"a {type(cache).__name__} has no room for a student's states; use the student's new_cache()")

    def _check_length(self, inputs: Inputs) -> None:
        """Refuse tokens behind keys that were turned for a shorter text."""
        past = inputs.cache.get_seq_length() if self.length_rules and inputs.cache is not None else 0
        if past:
            before, after = lengths(past, inputs.size[1], inputs.position_ids, inputs.attention_mask)
            if refusal := self.length_rules.refusal(before, after - before):
                raise ValueError(refusal)

    def _caches(self, inputs: Inputs, use_cache: bool | None) -> bool:
        """Whether a call without a cache gets one: never packed documents."""
        if inputs.documents is not None and inputs.attention_mask is None:
            return False
        return self.config.use_cache if use_cache is None else use_cache

    def _prefixed(self, inputs: Inputs) -> AbstractContextManager[Inputs]:
        """The inputs with meta tokens, where the student has any."""
        return nullcontext(inputs) if self.meta_tokens is None else self.meta_tokens.before(inputs, self.base_model)

    def _ends_filled(self, inputs: Inputs) -> AbstractContextManager[None]:
        """While the block runs, a row that ends in padding has its last token's hidden state there."""
        if inputs.documents is None or inputs.attention_mask is None or not self.layout.converted:
            return nullcontext()
        return ends_filled(self.base_model, inputs.documents >= 0)

    def check_windows(self, mask: Int[Tensor, "b s"], to_come: int = 0) -> None:
        """Refuse padding inside a text, with so many tokens to come, where attention that stays counts it among the tokens
        of its window.

        Raises:
            ValueError: naming the layer.
        """
        if self.layout.converted:  # with nothing swapped it is the teacher, its windows included
            check_windows(mask, self._kept_windows, to_come)

    @functools.cached_property
    def _kept_windows(self) -> dict[int, int]:
        """The windows of the attention layers that stay, by layer."""
        layers = DynamicCache(config=self.config.get_text_config(decoder=True)).layers
        windows = {i: getattr(layer, "sliding_window", None) for i, layer in enumerate(layers)}
        return {index: window for index, window in windows.items() if window and index not in self.layout.converted}

    def _arguments(self, inputs: Inputs, use_cache: bool) -> dict:
        """The inputs as the skeleton takes them."""
        documents, mask, unpadded = inputs.documents, inputs.attention_mask, None
        past = 0 if inputs.cache is None else inputs.cache.get_seq_length()
        if mask is not None:
            self.check_windows(mask)
        by_positions = self.place.documents == "positions"
        position_ids = self._marked(inputs, past) if by_positions else inputs.position_ids
        if documents is not None and mask is not None and not by_positions:
            unpadded = Unpadded.of(documents, past > 0, inputs.cache is not None)
        arguments = {
            "input_ids": inputs.input_ids,
            "attention_mask": mask,
            "position_ids": position_ids,
            CACHE: inputs.cache,
            "inputs_embeds": inputs.inputs_embeds,
            "use_cache": use_cache,
        }
        if self.givers:
            arguments["shared_keys"] = {giver: SharedKeys() for giver in self.givers.values()}
        arguments |= {} if unpadded is None else {"unpadded": unpadded}
        return arguments if documents is None or by_positions else arguments | {"document_ids": documents}

    def _marked(self, inputs: Inputs, past: int) -> Int[Tensor, "rows t"] | None:
        """Positions that say what is padding, and where documents begin."""
        documents, positions, masked = inputs.documents, inputs.position_ids, inputs.attention_mask is not None
        if documents is None and (positions is None or not masked or inputs.cache is not None):
            return None if positions is None else positions.long()
        rows, time = inputs.size
        if positions is None:
            positions = torch.arange(past, past + time, device=documents.device)[None]
        documents = torch.zeros_like(positions.expand(rows, -1)) if documents is None else documents
        return marked_positions(positions, documents, packed=not masked)


class FamilyDoor:
    """Stands in transformers' table of configs for a family's student until a config.json asks for it."""

    def __init_subclass__(cls, family: str) -> None:
        cls.family, cls.model_type = family, PREFIX + family

    @classmethod
    def from_dict(cls, config_dict: dict, **rest):
        """Make and register the family's classes, then let the real config class read the dictionary."""
        model_class = student_class(cls.family)
        AutoConfig.register(cls.model_type, model_class.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
        return model_class.config_class.from_dict(config_dict, **rest)


def register_families() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` know every family's student, without importing any family."""
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        door = type(f"{family}_door", (FamilyDoor,), {}, family=family)
        AutoConfig.register(PREFIX + family, door, exist_ok=True)


@functools.cache
def student_class(family: str) -> type:
    """The student class of a family, made of its transformers classes.

    Raises:
        ValueError: transformers has no causal language model of that type.
    """
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"transformers has no causal language model of type {family!r}")
    skeleton_config = CONFIG_MAPPING[family]
    skeleton = MODEL_FOR_CAUSAL_LM_MAPPING[skeleton_config]
    fields = {"model_type": PREFIX + family, "distill": None, "__annotations__": {"distill": dict | None}}
    config_class = type(f"Distill{skeleton_config.__name__}", (skeleton_config,), {**fields, "__module__": __name__})
    namespace = {"config_class": config_class, "__module__": __name__}
    if getattr(skeleton_config(), "attn_logit_softcapping", None) is not None:
        namespace["_supports_sdpa"] = False  # it would leave the cap out; transformers 5.24 says so itself, 5.17 does not
    return type(f"Distill{skeleton.__name__}", (StudentMixin, skeleton), namespace)


def build(skeleton: PretrainedConfig, layout: Layout, place: Place, shapes: Shapes):
    """A student with empty weights, on the meta device, in the skeleton's type.

    Args:
        skeleton: the teacher's config. shapes: the teacher's attention, layer by layer.

    Raises:
        ValueError: the layout is not as long as the model is deep, or a mixer refuses its options.
    """
    if len(layout.pattern) != skeleton.num_hidden_layers:
        raise ValueError(f"the layout names {len(layout.pattern)} layers, but the model has {skeleton.num_hidden_layers}")
    model_class = student_class(skeleton.model_type)
    entries = {key: value for key, value in skeleton.to_dict().items() if key not in ("model_type", "architectures")}
    entries.pop("quantization_config", None)
    entries["use_cache"] = True  # some training of the teacher may have left it false
    config = model_class.config_class.from_dict({**entries, "distill": to_dict(layout, place, shapes)})
    set_attention_implementation(config, attention_implementation(skeleton))
    with torch.device("meta"):
        return model_class(config)
