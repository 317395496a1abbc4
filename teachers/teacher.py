"""The teacher: a frozen transformers model with its tokenizer and its family's row of FAMILIES."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from teachers.checks import check_account
from teachers.compat import knows_windows
from teachers.families import Family
from teachers.fingerprint import fingerprint
from teachers.int8 import put_back, quantise
from teachers.observe import Observation, observe, project
from teachers.weights import AttentionWeights, LogitRules, norm_of, unpack


def positions_of(config: PretrainedConfig) -> int | None:
    """Returns how many tokens long a sequence may be for a model of this config; None if the config states no limit.

    The limit is `max_position_embeddings`, or more if the rotary embedding is scaled further: YaRN (and linear scaling with
    an original length) gives `factor` times the original length, dynamic NTK `factor` times `max_position_embeddings`. In
    configs of Llama 3, longrope and linear scaling (Gemma 3), `max_position_embeddings` is already the scaled length.
    """
    known = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    served = [] if known is None else [known]
    for entry in (rope, *rope.values()) if served else ():
        if not isinstance(entry, dict) or not entry.get("factor"):
            continue
        kind, original = entry.get("rope_type") or entry.get("type"), entry.get("original_max_position_embeddings")
        original = known if kind == "dynamic" else original
        if kind in ("yarn", "linear", "dynamic") and original:
            served.append(int(entry["factor"] * original))
    return max(served, default=None)


@dataclass
class Teacher:
    """A frozen language model with its tokenizer.

    reference: the name that the user gave. tokenizer: None for a model that is only used on token ids.
    ignored: tensors of the files that were left out because the user named them in `ignore`. folder: folder of the files;
    None for a model made without files. rounded: whether the checkpoint has more digits than the type of the weights in
    memory. unquantised: a quantised teacher's original weights by name, on the CPU; otherwise empty.
    """

    reference: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    family: Family
    ignored: tuple[str, ...] = ()
    folder: Path | None = None
    rounded: bool = False
    unquantised: dict[str, Tensor] = field(default_factory=dict)

    def quantise(self) -> None:
        """Quantise the weights of the linear layers to int8, in place; see `teachers.int8`.

        Raises:
            ImportError, ValueError: see `teachers.int8.quantise`.
        """
        _ = self.fingerprint  # computed and cached before the weights change
        self.unquantised = quantise(self.model)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Inside the block, a quantised teacher has its original weights; students are built from these."""
        if not self.unquantised:
            yield
            return
        with put_back(self.model, self.unquantised):
            yield

    @property
    def config(self) -> PretrainedConfig:
        """The model's transformers config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def n_layers(self) -> int:
        """The number of decoder layers."""
        return self.config.num_hidden_layers

    def positions(self, meta_tokens: int = 0) -> int | None:
        """Returns how long a sequence may be after `meta_tokens` learned tokens; None if the config states no limit."""
        found = positions_of(self.config)
        return None if found is None else found - meta_tokens

    def check_account(self) -> None:
        """Refuse a model that does not hold as many values as its files, according to the files' headers.

        Raises:
            ValueError: see `checks.check_account`.
        """
        if self.folder is not None:
            with self.as_it_was():
                check_account(self.reference, str(self.folder), self.model, self.ignored)

    @contextmanager
    def narrow_windows(self, size: int) -> Iterator[None]:
        """Inside the block, windows have at most `size` tokens, so that a short sequence shows which layers have one."""
        wide = getattr(self.config, "sliding_window", None)
        if not wide or wide <= size:
            yield
            return
        self.config.sliding_window = size
        try:
            yield
        finally:
            self.config.sliding_window = wide

    def slot(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        layers = cast(nn.ModuleList, self.model.get_submodule(self.family.layers))
        return getattr(layers[layer], self.family.slot)

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Returns a layer's projections and norms, head-major."""
        return unpack(self.slot(layer), self.family, self.config.num_attention_heads, self.head_dim)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def logit_rules(self, layer: int) -> LogitRules:
        """Returns the rules of a layer's attention logits: scale, soft-cap, window, rotary embedding and norms."""
        slot, config = self.slot(layer), self.config
        kinds = getattr(config, "layer_types", None)
        slides = kinds is None or kinds[layer] == "sliding_attention"
        norm, norm_eps = norm_of(slot, self.family)
        return LogitRules(
            scale=getattr(slot, "scaling", None) or self.head_dim**-0.5,
            softcap=getattr(config, "attn_logit_softcapping", None),
            window=getattr(config, "sliding_window", None) if slides and knows_windows(slot) else None,
            rope=self.family.rope if getattr(slot, "use_rope", True) else None,
            norm=norm,
            norm_eps=norm_eps,
        )

    def observe(
        self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "b t"], layers: Sequence[int], qkv: bool = False
    ) -> Iterator[Observation]:
        """Yields some layers' attention inputs and outputs, and with `qkv` q, k and v after norms and rotary embedding.

        See `observe.observe`.
        """
        slots = {layer: self.slot(layer) for layer in layers}
        if not qkv or self.family.recorded:
            return observe(self.model, slots, ids, positions, qkv)
        return (self._with_qkv(seen) for seen in observe(self.model, slots, ids, positions, False))

    def _with_qkv(self, seen: Observation) -> Observation:
        q, k, v = project(self.attention_weights(seen.layer), self.logit_rules(seen.layer), seen.input, seen.rope)
        return replace(seen, q=q, k=k, v=v)

    @torch.no_grad()
    def hidden(self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Returns the last hidden states, from which the output head computes logits."""
        return self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state

    @cached_property
    def fingerprint(self) -> str:
        """The identifier of this teacher, see `teachers.fingerprint`. Equal fingerprints are no proof of equal teachers."""
        return fingerprint(self.model, self.config, self.tokenizer, self.rounded)
