"""Student models: subclasses of the teacher's transformers class, with mixers in place of some attention layers.

A family such as `llama` gets a config class with model_type `distill_llama` and a model class. Both are subclasses of
transformers' classes and are made at first use. Weights that are not converted keep their names.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from students.arguments import SkeletonArguments
from students.body import WatchedBody, own_call
from students.cache import MixerState
from students.compat import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    attention_implementation,
    set_attention_implementation,
)
from students.config import Layout, Place, Shapes, StudentConfigMixin
from students.entry import from_dict, to_dict
from students.generating import Generating
from students.inputs import Inputs, checked
from students.meta_tokens import MetaTokens, TextCache
from students.mixers.mixer import Mixer
from students.rotary import LengthRules, forget_lengths
from students.shapes import Float, Int
from students.shared_keys import check_shared_keys
from students.skeleton import Student
from students.slot import MixerSlot

PREFIX = "distill_"
OF = "_of_"  # between the class name and the family, in the names that pickles store


class StudentMixin(WatchedBody, SkeletonArguments, Generating):
    """The student's part of a student class, mixed into the skeleton's class: slots, documents, and a fitting cache."""

    # A recurrent state cannot be rolled back; with this, assisted generation raises a clear error (transformers 5.17, 5.24).
    _is_stateful = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.layout, self.place, self.shapes = from_dict(config.distill)
        layers = self._layers()
        self.givers = self.layout.givers
        keys_of = {giver: giver for giver in self.givers.values()} | self.givers
        for index in self.layout.converted:
            mixer = self.layout.make(index, self.shapes.at(index))
            slot = MixerSlot(mixer, index, self.place.documents, keys_of.get(index))
            setattr(layers[index], self.place.name, slot)
        mixers = self.mixers
        for owner, *others in self.layout.groups:
            for layer in others:
                mixers[layer].tie(mixers[owner])
        check_shared_keys(self.mixers, self.givers, self.shapes, self.place)
        self.newest = self.layout.converted  # the layers that were converted last, see `students.converting`
        # transformers (5.17, 5.24) makes this set for each model in `post_init`, and reads it when weights are loaded.
        self._keep_in_fp32_modules_strict |= self.float32_names
        count = self.layout.meta_tokens
        self.length_rules = LengthRules.of(config)
        forget_lengths(self)
        width = cast(torch.nn.Embedding, self.get_input_embeddings()).embedding_dim
        self.meta_tokens = MetaTokens(count, width, before_zero=bool(self.length_rules)) if count else None
        self.watch_body()

    def _layers(self) -> torch.nn.ModuleList:
        """The list of layers.

        Raises:
            ValueError: the list is not where config.json says, not as long as the layout, or has no attention there.
        """
        found: torch.nn.Module | None = self
        for part in self.place.layers.split("."):
            found = getattr(found, part, None)
        layers = found if isinstance(found, torch.nn.ModuleList) else ()
        if len(layers) != len(self.layout.pattern) or not all(
            isinstance(getattr(layer, self.place.name, None), torch.nn.Module) for layer in layers
        ):
            raise ValueError(
                f"config.json's `distill` entry names {len(self.layout.pattern)} layers with attention in "
                f"{self.place.layers}.*.{self.place.name}, but {type(self).__name__} has {len(layers)} layers there; "
                "the entry does not fit the rest of config.json"
            )
        return cast(torch.nn.ModuleList, layers)

    @property
    def mixers(self) -> dict[int, Mixer]:
        """The mixers by layer."""
        layers = cast(torch.nn.ModuleList, self.get_submodule(self.place.layers))
        return {index: getattr(layers[index], self.place.name).mixer for index in self.layout.converted}

    @property
    def float32_names(self) -> set[str]:
        """Names of parameters, buffers and modules that the mixers and their parts keep in float32."""
        parts = [part for mixer in self.mixers.values() for part in mixer.modules() if isinstance(part, Mixer)]
        return set().union(*(part.float32 for part in parts))

    def mixer_prefix(self, layer: int) -> str:
        """The prefix of the names of a layer's mixer parameters."""
        return f"{self.place.layers}.{layer}.{self.place.name}.mixer."

    @property
    def own_prefixes(self) -> tuple[str, ...]:
        """The prefixes of all parameters and buffers that the skeleton does not have."""
        return (*(self.mixer_prefix(layer) for layer in self.layout.converted), "meta_tokens.")

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **rest: Any,
    ) -> Any:
        """The skeleton's forward; packed documents are given as `document_ids` or as `position_ids` that start again.

        The cache may be passed as `cache` or `past_key_values` in any version of transformers. With `labels` the output has
        the skeleton's own loss; further arguments of the loss (`num_items_in_batch`, `shift_labels`) are passed on.

        Raises:
            ValueError: inputs that slots cannot use (see `inputs.checked`), or a cache that is out of date because the
                rotary embedding changes at the new length.
        """
        cache = past_key_values if cache is None else cache
        # Both are named in the signature: `generate` looks there for logits_to_keep, and trainers look for labels.
        rest |= {"logits_to_keep": logits_to_keep} | ({} if labels is None else {"labels": labels})
        given = (input_ids, attention_mask, position_ids, inputs_embeds, use_cache, document_ids, cache)
        with self.entered(*given) as arguments:
            return super().forward(**arguments, **rest)

    @contextmanager
    def entered(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        document_ids: Tensor | None,
        cache: Cache | None,
    ) -> Iterator[dict]:
        """Yields the skeleton's arguments for these inputs (see `forward`); the skeleton is called inside the block."""
        self._check_cache(cache)
        inputs = checked(input_ids, inputs_embeds, attention_mask, position_ids, cache, document_ids)
        self._check_length(inputs)
        if cache is None and self._caches(inputs, use_cache):
            inputs = replace(inputs, cache=self.new_cache())
        use_cache = inputs.cache is not None and use_cache is not False
        with self._prefixed(inputs) as prefixed, self._ends_filled(inputs), own_call():
            yield self._arguments(prefixed, use_cache)

    def hidden(
        self, input_ids: Int[Tensor, "b t"], document_ids: Int[Tensor, "b t"] | None, cache: Cache | None = None
    ) -> Float[Tensor, "b t d"]:
        """The last hidden states, before the head; with a cache, those of the new tokens."""
        with self._prefixed(checked(input_ids, cache=cache, document_ids=document_ids)) as inputs, own_call():
            return self.base_model(**self._arguments(inputs, cache is not None)).last_hidden_state

    @property
    def text_columns(self) -> Int[Tensor, "b t"] | None:
        """The columns of the text's tokens in hidden states while `hidden` runs; None for a student without meta tokens."""
        return None if self.meta_tokens is None else self.meta_tokens.columns

    def next_logits(
        self, token: Int[Tensor, "b 1"], positions: Int[Tensor, "b 1"], mask: Tensor | dict[str, Tensor], cache: Cache
    ) -> Float[Tensor, "b v"]:
        """The logits after one token that follows a cache, without checks that wait for the GPU.

        Args:
            positions, mask, cache: as the skeleton takes them (see `behind`); the skeleton uses the mask unchanged.
        """
        arguments = self._arguments(Inputs(token, None, None, positions, cache), True)
        with own_call():
            return super().forward(**arguments | {"attention_mask": mask}).logits[:, -1]

    def behind(self, inputs: Inputs) -> Inputs:
        """A call's mask, positions and cache as the skeleton takes them, for a cache that holds tokens."""
        with self._prefixed(inputs) as inputs:
            return inputs

    def new_cache(self) -> Cache:
        """An empty cache: a `MixerState` for each slot, transformers' own layer for each kept attention."""
        own = DynamicCache(config=self.config.get_text_config(decoder=True)).layers
        layers = [MixerState() if i in self.layout.converted else layer for i, layer in enumerate(own)]
        return Cache(layers=layers) if self.meta_tokens is None else TextCache(layers, self.meta_tokens.count)

    def _check_cache(self, cache: Cache | None) -> None:
        """Refuse a cache without places for the slots' states; `MetaTokens.before` checks the cache of meta tokens."""
        if cache is None or self.meta_tokens is not None:
            return
        if [i for i, layer in enumerate(cache.layers) if isinstance(layer, MixerState)] != self.layout.converted:
            raise ValueError(f"a {type(cache).__name__} has no room for a student's states; use the student's new_cache()")

    def _caches(self, inputs: Inputs, use_cache: bool | None) -> bool:
        """Whether a call without a cache gets one; packed documents never do."""
        if inputs.documents is not None and inputs.attention_mask is None:
            return False
        return self.config.use_cache if use_cache is None else use_cache

    def _prefixed(self, inputs: Inputs) -> AbstractContextManager[Inputs]:
        """The inputs, with meta tokens if the student has any."""
        return nullcontext(inputs) if self.meta_tokens is None else self.meta_tokens.before(inputs, self.base_model)


class FamilyDoor:
    """A placeholder for a family's config class in transformers' table, until a config.json of that family is read."""

    family: ClassVar[str]
    model_type: ClassVar[str]

    def __init_subclass__(cls, family: str) -> None:
        cls.family, cls.model_type = family, PREFIX + family

    @classmethod
    def from_dict(cls, config_dict: dict, **rest: Any) -> PretrainedConfig | tuple[PretrainedConfig, dict[str, Any]]:
        """Make and register the family's classes, then let the real config class read the dictionary."""
        model_class = student_class(cls.family)
        AutoConfig.register(cls.model_type, model_class.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
        return model_class.config_class.from_dict(config_dict, **rest)


def register_families() -> None:
    """Register every family's student with `AutoConfig` and `AutoModelForCausalLM`, without importing any family."""
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        AutoConfig.register(PREFIX + family, type(f"{family}_door", (FamilyDoor,), {}, family=family), exist_ok=True)


@functools.cache
def student_class(family: str) -> Any:
    """The student class of a family, made from its transformers classes.

    Raises:
        ValueError: transformers has no causal language model of that type.
    """
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"transformers has no causal language model of type {family!r}")
    skeleton_config = CONFIG_MAPPING[family]
    skeleton = cast(type, MODEL_FOR_CAUSAL_LM_MAPPING[skeleton_config])
    fields = {"model_type": PREFIX + family, "distill": None, "__annotations__": {"distill": dict | None}}
    config_class = _named(family, (StudentConfigMixin, skeleton_config), fields)
    namespace: dict[str, Any] = {"config_class": config_class}
    if getattr(skeleton_config(), "attn_logit_softcapping", None) is not None:
        namespace["_supports_sdpa"] = False  # SDPA would leave out the cap; transformers 5.24 declares it, 5.17 does not
    # The skeleton is a GenerationMixin already; transformers (5.17, 5.24) wants it among the direct bases. Otherwise it
    # loads a remote class that overrides `generate` as a subclass, which pickles cannot find.
    return _named(family, (StudentMixin, skeleton, GenerationMixin), namespace)


def _named(family: str, bases: tuple[type, ...], namespace: dict) -> type:
    """A class named after the skeleton's; its qualified name has the family, because some families share class names."""
    name = f"Distill{bases[1].__name__}"
    return type(name, bases, {**namespace, "__module__": __name__, "__qualname__": f"{name}{OF}{family}"})


def __getattr__(name: str) -> type:
    """A family's classes by the names that pickles store, made at first use."""
    family = name.partition(OF)[2]
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model_class = student_class(family)
        for each in (model_class, model_class.config_class):
            if each.__qualname__ == name:
                return each
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(skeleton: PretrainedConfig, layout: Layout, place: Place, shapes: Shapes) -> Student:
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
    entries["use_cache"] = True  # the teacher's training may have left it false
    config = model_class.config_class.from_dict({**entries, "distill": to_dict(layout, place, shapes)})
    set_attention_implementation(config, attention_implementation(skeleton))
    with torch.device("meta"):
        return model_class(config)
