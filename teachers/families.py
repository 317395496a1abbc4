"""The table of families: one row for each transformers architecture, which describes its attention.

A row names the attention modules, the packing of their projections, the norms and the rotary embedding between projections
and softmax, and the argument that brings document ids and padding to a student's slots.
"""

from dataclasses import dataclass

import transformers
from packaging.version import Version
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        examples: published models of it. layers: path of the list of decoder layers. slot: the attention's name in a layer.
        packing: how q, k and v are packed, a key of `teachers.weights.PACKINGS`. qkv, output: the projections' names.
        norms: names of the norms on q and k, if the attention has them. norm: "rms" over each head, "rms_wide" over all
            heads together, "layer" over each head with its mean removed. norm_offset: added to the norms' weights.
        rope: how rotary embedding pairs channels: "half" (i with i + r / 2), "pairs" (2 i with 2 i + 1), None for none.
        documents: how document ids and padding reach a slot: "keywords" (the decoder passes on forward's keyword arguments)
            or "positions" (the decoder drops them, but passes on position_ids).
        recorded: whether the attention runs through transformers' AttentionInterface, where q, k and v can be recorded.
        attention: the attention implementation to load with, None for transformers' own choice.
        since: the first version of transformers in which this family works; None if the oldest supported one will do.
        refused: triples of config entry, unsupported value and reason.
        note: a limit or property of the family, for users.
    """

    examples: str
    layers: str = "model.layers"
    slot: str = "self_attn"
    packing: str = "separate"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    norms: tuple[str, str] = ("q_norm", "k_norm")
    norm: str = "rms"
    norm_offset: float = 0.0
    rope: str | None = "half"
    documents: str = "keywords"
    recorded: bool = True
    attention: str | None = None
    since: str | None = None
    refused: tuple[tuple[str, object, str], ...] = ()
    note: str = ""


BIDIRECTIONAL = ("use_bidirectional_attention", True, "its attention reads later tokens, which a state-space model cannot")
FUSED = ("query_key_value",)

FAMILIES = {
    "llama": Family("Llama 2 and 3, SmolLM2, TinyLlama"),
    "smollm3": Family("SmolLM3", note="every fourth layer has no rotary embedding; detected layer by layer"),
    "mistral": Family("Mistral 7B"),
    "granite": Family("Granite 3"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3 (dense)"),
    "phi": Family(
        "Phi-1, Phi-1.5, Phi-2",
        output="dense",
        norms=("q_layernorm", "k_layernorm"),
        refused=(("qk_layernorm", True, "its q and k norms have biases, which no mixer can take over"),),
    ),
    "phi3": Family("Phi-3, Phi-3.5, Phi-4-mini", packing="stacked", qkv=("qkv_proj",)),
    "gemma2": Family(
        "Gemma 2",
        attention="eager",
        refused=(BIDIRECTIONAL,),
        note="runs with eager attention: sdpa would leave out the soft cap on its logits",
    ),
    "gemma3_text": Family("Gemma 3 (text: 270M, 1B)", norm_offset=1.0, refused=(BIDIRECTIONAL,)),
    "gpt_neox": Family("Pythia, GPT-NeoX", "gpt_neox.layers", "attention", packing="grouped", qkv=FUSED, output="dense"),
    "falcon": Family(
        "Falcon 7B, 11B, 40B",
        "transformer.h",
        "self_attention",
        packing="grouped",
        qkv=FUSED,
        output="dense",
        documents="positions",
        recorded=False,
        since="5.24",
        refused=(("alibi", True, "its positions are biases on the logits (ALiBi); only rotary ones are taken over"),),
        note="from transformers 5.24 on: in 5.17 packed documents see each other",
    ),
    "gpt2": Family("GPT-2", "transformer.h", "attn", packing="columns", qkv=("c_attn",), output="c_proj", rope=None),
    "olmo2": Family("OLMo 2", norm="rms_wide"),
    "stablelm": Family("StableLM 2", norms=("q_layernorm", "k_layernorm"), norm="layer", documents="positions"),
    "cohere": Family("Command R, Aya 23", norm="layer", rope="pairs"),
    "mixtral": Family("Mixtral", note="mixture of experts: only the attention is converted"),
    "qwen3_moe": Family("Qwen3 MoE", note="mixture of experts: only the attention is converted"),
}


def family_of(config: PretrainedConfig, reference: str) -> Family:
    """Returns the row of a transformers config.

    Raises:
        ValueError: there is no such row, transformers is too old for it, or the config has a value that the row refuses.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"{reference} is a {model_type!r} model; this version distils {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    if family.since and Version(transformers.__version__) < Version(family.since):
        raise ValueError(
            f"{reference} is a {model_type!r} model, which needs transformers >= {family.since}; this is "
            f"{transformers.__version__}: upgrade it"
        )
    for entry, value, why in family.refused:
        if getattr(config, entry, None) == value:
            raise ValueError(f"{reference} is a {model_type!r} model with {entry} = {value} in its config.json: {why}")
    return family
