"""Recording of a teacher's attention: inputs, outputs, q, k and v, taken by hooks in one forward pass, nothing changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from teachers.compat import add_attention, attention_function, attention_implementation, attention_replaced
from teachers.weights import AttentionWeights, LogitRules

RECORDING = "distill_recording_"  # prefix; the name of the wrapped attention implementation follows

_queries_and_keys: ContextVar[dict | None] = ContextVar("queries_and_keys", default=None)


@dataclass(frozen=True)
class Observation:
    """One layer's attention on one batch: input, output, rotary tables, and optionally q, k and v before the softmax."""

    layer: int
    input: Float[Tensor, "b t d"]
    output: Float[Tensor, "b t d"]
    rope: tuple[Tensor, Tensor] | None
    q: Float[Tensor, "b t h p"] | None = None
    k: Float[Tensor, "b t kv p"] | None = None
    v: Float[Tensor, "b t kv p"] | None = None

    def wide(self) -> "Observation":
        """Returns a copy in float32 or wider, for a teacher in bfloat16; the rotary tables are unchanged."""
        parts = {name: getattr(self, name) for name in ("input", "output", "q", "k", "v")}
        kinds = {name: torch.promote_types(part.dtype, torch.float32) for name, part in parts.items() if part is not None}
        return replace(self, **{name: parts[name].to(kind) for name, kind in kinds.items()})


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    slots: dict[int, nn.Module],
    ids: Int[Tensor, "b t"],
    positions: Int[Tensor, "b t"],
    qkv: bool,
) -> Iterator[Observation]:
    """Run the model without its output head once and yield one layer at a time, in order.

    Args:
        slots: the attention modules to record, by layer. positions: restart at 0 with every document.
        qkv: also record queries (after norms and rotary embedding), keys and values.

    Memory: two [b t d] tensors for each recorded layer until it is yielded, plus q, k and v with `qkv`. A layer that was
    yielded can be freed.
    """
    seen: dict[int, dict] = {layer: {} for layer in slots}
    hooks = []
    for layer, slot in slots.items():
        hooks.append(slot.register_forward_pre_hook(_record_input(seen[layer]), with_kwargs=True))
        hooks.append(slot.register_forward_hook(_record_output(seen[layer])))
    try:
        with _recorded_attention(model, {id(slot): seen[layer] for layer, slot in slots.items()}, qkv):
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return (Observation(layer, **seen.pop(layer)) for layer in sorted(slots))


def _record_input(record: dict):
    def hook(module, arguments, keywords):
        record["input"] = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        record["rope"] = keywords.get("position_embeddings")

    return hook


def _record_output(record: dict):
    def hook(module, arguments, output):
        record["output"] = output[0] if isinstance(output, tuple) else output

    return hook


@contextmanager
def _recorded_attention(model: PreTrainedModel, records: dict[int, dict], wanted: bool) -> Iterator[None]:
    """Inside the block, the model runs an attention implementation that records q, k and v."""
    if not wanted:
        yield
        return
    token = _queries_and_keys.set(records)
    try:
        with attention_replaced(model.config, _recording(attention_implementation(model.config))):
            yield
    finally:
        _queries_and_keys.reset(token)


def _recording(original: str) -> str:
    """Returns the name of an attention implementation that records and then calls `original`; registered once."""

    def attend(module: nn.Module, query, key, value, attention_mask, **keywords):
        record = (_queries_and_keys.get() or {}).get(id(module))
        if record is not None:
            record.update(q=query.transpose(1, 2), k=key.transpose(1, 2), v=value.transpose(1, 2))
        work = attention_function(original, module)
        return work(module, query, key, value, attention_mask, **keywords)

    add_attention(RECORDING + original, attend, original)
    return RECORDING + original


@torch.no_grad()
def project(
    weights: AttentionWeights,
    rules: LogitRules,
    h: Float[Tensor, "b t d"],
    rope: tuple[Tensor, Tensor] | None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b t kv p"], Float[Tensor, "b t kv p"]]:
    """Compute q, k and v as the softmax gets them from a layer's input, for attention that cannot be recorded.

    Raises:
        ValueError: the layer has norms on q and k, or a rotary embedding of pairs: no family with these needs this function.
    """
    if rules.norm is not None or rules.rope == "pairs":
        raise ValueError(f"q and k with norm {rules.norm} and rope {rules.rope} are only known by recording them")
    parts = []
    for weight, bias in ((weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias)):
        flat = None if bias is None else bias.flatten().to(h.dtype)
        part = nn.functional.linear(h, weight.flatten(0, 1).to(h.dtype), flat)
        parts.append(part.unflatten(-1, weight.shape[:2]))
    q, k, v = parts
    return (*((q, k) if rope is None else (_rotate(q, rope), _rotate(k, rope))), v)


def _rotate(x: Float[Tensor, "b t h p"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "b t h p"]:
    cos, sin = (table[:, :, None].to(x.dtype) for table in rope)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, kept], -1)
