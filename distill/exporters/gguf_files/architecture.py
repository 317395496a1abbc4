"""The base class of llama.cpp's architectures: a GGUF file's entries and tensors, made from those of a transformers class.

Names, orders and shapes are llama.cpp's (`llama-arch.cpp` and its graph of each architecture, October 2026).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from teachers.compat import rotary_frequencies

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCALINGS = ("default", "linear", "yarn", "llama3")  # llama3 only where the graph reads divisors of frequencies
YARN = {"rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"} | {
    "beta_fast",
    "beta_slow",
}  # the parameters of yarn that a file can hold
Entry = int | float | bool | str | list[int] | list[bool]


class Architecture:
    """Base class of the architectures. name: llama.cpp's name of the architecture."""

    name: ClassVar[str]

    def reasons(self, config: "PretrainedConfig") -> list[str]:
        """Return why llama.cpp would not compute what the class computes; empty if it does."""
        raise NotImplementedError

    def entries(self, config: "PretrainedConfig") -> dict[str, Entry]:
        """Return the file's entries of the model, without the architecture's name as prefix."""
        raise NotImplementedError

    def tensors(self, config: "PretrainedConfig", tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the file's tensors in float32 with their names, made from those of the class, one layer at a time.

        Raises:
            ValueError: a tensor is missing, is not used, or has another shape than the config says.
        """
        raise NotImplementedError

    def float32(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor stays in float32: all but the matrices of matrix products."""
        return tensor.ndim < 2 or any(part in name for part in ("ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm", "ffn_gate_inp"))


class Taken:
    """The tensors of a class, with a record of which were read, so that none is left out of the file unnoticed."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._names = tensors, set(tensors)
        self._taken: set[str] = set()

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return a tensor in float32.

        Raises:
            ValueError: the tensor is missing, or has another shape.
        """
        if name not in self._names:
            raise ValueError(f"the tensor {name} is missing")
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"the tensor {name} has shape {tuple(tensor.shape)}, but the config says {shape}")
        self._taken.add(name)
        return tensor.float()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def finish(self, *ignored: str) -> None:
        """Refuse a tensor that was never read.

        Raises:
            ValueError: naming the tensor.
        """
        left = sorted(self._names - self._taken - set(ignored))
        if left:
            raise ValueError(f"the tensor {left[0]} has no place in a GGUF file")


def outer(taken: Taken, config: "PretrainedConfig", norm: str, offset: float = 0.0) -> dict[str, Tensor]:
    """Return the embedding, the last norm, and the output head if it is not tied."""
    table = (config.vocab_size, config.hidden_size)
    found = {
        "token_embd.weight": taken("model.embed_tokens.weight", *table),
        "output_norm.weight": taken(norm, config.hidden_size) + offset,
    }
    if not config.tie_word_embeddings:
        found["output.weight"] = taken("lm_head.weight", *table)
    return found


def attention(
    taken: Taken, prefix: str, config: "PretrainedConfig", *, interleaved: bool, output_bias: bool = True
) -> dict[str, Tensor]:
    """Return the projections of queries, keys, values and output of a layer, with the biases that it has.

    Args:
        interleaved: whether llama.cpp rotates neighbouring rows of q and k; transformers rotates rows half a head apart.
        output_bias: whether llama.cpp adds a bias to the output.

    Raises:
        ValueError: the output has a bias that llama.cpp would leave out.
    """
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    rows = {"q": heads * width, "k": keys * width, "v": keys * width}
    found = {}
    for part, count in rows.items():
        for kind, shape in (("weight", (count, config.hidden_size)), ("bias", (count,))):
            name = f"{prefix}.{part}_proj.{kind}"
            if kind == "bias" and name not in taken:
                continue
            tensor = taken(name, *shape)
            if interleaved and part != "v":
                tensor = tensor.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
            found[f"attn_{part}.{kind}"] = tensor
    found["attn_output.weight"] = taken(f"{prefix}.o_proj.weight", config.hidden_size, heads * width)
    if (name := f"{prefix}.o_proj.bias") in taken:
        bias = taken(name, config.hidden_size)
        if output_bias:
            found["attn_output.bias"] = bias
        elif bias.any():
            raise ValueError(f"{name} is not zero, but llama.cpp adds no bias there")
    return found


def gated(taken: Taken, prefix: str, hidden: int, width: int) -> dict[str, Tensor]:
    """Return the three matrices of a gated feed-forward layer."""
    return {
        "ffn_gate.weight": taken(f"{prefix}.gate_proj.weight", width, hidden),
        "ffn_up.weight": taken(f"{prefix}.up_proj.weight", width, hidden),
        "ffn_down.weight": taken(f"{prefix}.down_proj.weight", hidden, width),
    }


def head_dim(config: "PretrainedConfig") -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def usual(config: "PretrainedConfig") -> dict[str, Entry]:
    """Return the entries that all architectures share."""
    width = head_dim(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def rope(config: "PretrainedConfig", rotated: int) -> dict[str, Entry]:
    """Return the entries of the rotary embedding of `rotated` channels a head. llama3's scaling is in `rope_divisors`."""
    parameters = config.rope_parameters
    found: dict[str, Entry] = {"rope.freq_base": float(parameters["rope_theta"]), "rope.dimension_count": rotated}
    if (kind := parameters.get("rope_type", "default")) in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        usual_length = config.max_position_embeddings
        found |= {
            "rope.scaling.original_context_length": parameters.get("original_max_position_embeddings", usual_length),
            "rope.scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1),
        }
    return found


def rope_reason(config: "PretrainedConfig", known: tuple[str, ...] = SCALINGS) -> list[str]:
    """Return why llama.cpp cannot rotate by the config's parameters; empty if it can."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in known:
        return [f"llama.cpp has no rotary embedding of type {kind!r} for this architecture ({', '.join(known)})"]
    odd = sorted(name for name, value in parameters.items() if name not in YARN and value is not None)
    if kind == "yarn" and odd:
        return [f"llama.cpp's yarn has fixed values for parameters that the teacher sets ({', '.join(odd)})"]
    return []


def rope_divisors(config: "PretrainedConfig", rotated: int) -> dict[str, Tensor]:
    """Return the divisors of llama3's frequencies as the tensor that llama.cpp reads; empty for any other scaling."""
    parameters = config.rope_parameters
    if parameters.get("rope_type", "default") != "llama3":
        return {}
    plain = parameters["rope_theta"] ** (-torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return {"rope_freqs.weight": plain / rotary_frequencies("llama3", config).float()}


def named(layer: int, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Yield a layer's tensors with their names in the file."""
    return ((f"blk.{layer}.{name}", tensor) for name, tensor in tensors.items())


def plain_activation(config: "PretrainedConfig") -> list[str]:
    """Return why the activation is not llama.cpp's fixed one; empty if it is."""
    return [] if config.hidden_act == "silu" else [f"llama.cpp's activation is silu, not {config.hidden_act}"]
