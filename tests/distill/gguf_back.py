"""Loads a GGUF file into the transformers class that it was written from.

Names and orders are spelled out here again, so that a mistake of the writer cannot hide in both. Zero padding of the file
stays: the class is as wide as the file.
"""

import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM


def contents(path):
    """The entries of a file, its tensors in float32 as torch has them, and the names of their types."""
    reader = GGUFReader(path)
    entries = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)).float() for t in reader.tensors}
    return entries, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def model_of(path, student):
    """The model of a file: sizes, layers and multipliers are the file's, rotary parameters the student's."""
    entries, tensors, _ = contents(path)
    architecture = entries["general.architecture"]
    said = {name.removeprefix(f"{architecture}."): value for name, value in entries.items()}
    build = {"granitehybrid": _granite, "qwen35": _qwen, "falcon-h1": _falcon}[architecture]
    tensors.pop("rope_freqs.weight", None)
    usual = {
        "vocab_size": len(tensors["token_embd.weight"]),
        "hidden_size": said["embedding_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": said["attention.head_count"],
        "head_dim": said["attention.key_length"],
        "intermediate_size": said["feed_forward_length"],
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": said["attention.layer_norm_rms_epsilon"],
        "rope_parameters": dict(student.config.rope_parameters),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    kind, config, state = build(said, tensors, usual)
    state |= {"model.embed_tokens.weight": tensors.pop("token_embd.weight")}
    state["lm_head.weight"] = tensors.pop("output.weight", state["model.embed_tokens.weight"])
    state["model.final_layernorm.weight" if kind == "falcon_h1" else "model.norm.weight"] = tensors.pop("output_norm.weight")
    assert not tensors, sorted(tensors)
    if kind == "qwen3_5_text":
        state = {n: t - 1 if n.endswith("norm.weight") and "linear_attn" not in n else t for n, t in state.items()}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).float().eval()
    model.load_state_dict(state)
    return model


def _halves(weight, heads):
    """Rows that llama.cpp rotates side by side, as transformers has them, half a head apart."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _mamba(at, out, tensors, said):
    """The tensors of a mixer from those of a block."""
    state = {
        f"{out}.in_proj.weight": tensors.pop(f"{at}.ssm_in.weight"),
        f"{out}.conv1d.weight": tensors.pop(f"{at}.ssm_conv1d.weight")[:, None],
        f"{out}.conv1d.bias": tensors.pop(f"{at}.ssm_conv1d.bias"),
        f"{out}.dt_bias": tensors.pop(f"{at}.ssm_dt.bias"),
        f"{out}.A_log": (-tensors.pop(f"{at}.ssm_a")[:, 0]).log(),
        f"{out}.D": tensors.pop(f"{at}.ssm_d")[:, 0],
        f"{out}.out_proj.weight": tensors.pop(f"{at}.ssm_out.weight"),
    }
    if (norm := tensors.pop(f"{at}.ssm_norm.weight", None)) is not None:
        assert norm.shape[0] == said["ssm.group_count"]
        state[f"{out}.norm.weight"] = norm.flatten()
    return state


def _mamba_sizes(said):
    return {
        "mamba_n_heads": said["ssm.time_step_rank"],
        "mamba_d_head": said["ssm.inner_size"] // said["ssm.time_step_rank"],
        "mamba_n_groups": said["ssm.group_count"],
        "mamba_d_state": said["ssm.state_size"],
        "mamba_d_conv": said["ssm.conv_kernel"],
    }


def _granite(said, tensors, usual):
    experts, state = said.get("expert_count", 0), {}
    keys = said["attention.head_count_kv"]
    config = usual | _mamba_sizes(said)
    config |= {
        "num_key_value_heads": max(keys),
        "layer_types": ["full_attention" if count else "linear_attention" for count in keys],
        "mamba_expand": 2,
        "position_embedding_type": "rope" if said["rope.scaling.finetuned"] else "nope",
        "attention_multiplier": said["attention.scale"],
        "embedding_multiplier": said["embedding_scale"],
        "residual_multiplier": said["residual_scale"],
        "logits_scaling": said["logit_scale"],
        "num_local_experts": experts,
        "num_experts_per_tok": said.get("expert_used_count", 0),
        "shared_intermediate_size": said.get("expert_shared_feed_forward_length", usual["intermediate_size"]),
        "attention_bias": any(name.endswith("attn_q.bias") for name in tensors),
    }
    for layer, count in enumerate(keys):
        at, to = f"blk.{layer}", f"model.layers.{layer}"
        state[f"{to}.input_layernorm.weight"] = tensors.pop(f"{at}.attn_norm.weight")
        state[f"{to}.post_attention_layernorm.weight"] = tensors.pop(f"{at}.ffn_norm.weight")
        if count:
            for part, heads in (("q", usual["num_attention_heads"]), ("k", count), ("v", None), ("o", None)):
                for kind in ("weight", "bias"):
                    name = f"{at}.attn_{'output' if part == 'o' else part}.{kind}"
                    if name in tensors:
                        tensor = tensors.pop(name)
                        state[f"{to}.self_attn.{part}_proj.{kind}"] = _halves(tensor, heads) if heads else tensor
        else:
            state |= _mamba(at, f"{to}.mamba", tensors, said)
        end = "_shexp" if experts else ""
        gate, up, down = (tensors.pop(f"{at}.ffn_{part}{end}.weight") for part in ("gate", "up", "down"))
        state[f"{to}.shared_mlp.input_linear.weight"] = torch.cat([gate, up])
        state[f"{to}.shared_mlp.output_linear.weight"] = down
        if experts:
            gate, up, down = (tensors.pop(f"{at}.ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
            state[f"{to}.block_sparse_moe.router.weight"] = tensors.pop(f"{at}.ffn_gate_inp.weight")
            state[f"{to}.block_sparse_moe.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            state[f"{to}.block_sparse_moe.experts.down_proj"] = down
    return "granitemoehybrid", config, state


def _qwen(said, tensors, usual):
    recurrent, state = said["attention.recurrent_layers"], {}
    config = usual | {
        "num_key_value_heads": said["attention.head_count_kv"],
        "layer_types": ["linear_attention" if each else "full_attention" for each in recurrent],
        "linear_conv_kernel_dim": said["ssm.conv_kernel"],
        "linear_key_head_dim": said["ssm.state_size"],
        "linear_value_head_dim": said["ssm.inner_size"] // said["ssm.time_step_rank"],
        "linear_num_key_heads": said["ssm.group_count"],
        "linear_num_value_heads": said["ssm.time_step_rank"],
    }
    config["rope_parameters"]["partial_rotary_factor"] = said["rope.dimension_count"] / usual["head_dim"]
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
    for layer, each in enumerate(recurrent):
        at, to = f"blk.{layer}", f"model.layers.{layer}"
        state[f"{to}.input_layernorm.weight"] = tensors.pop(f"{at}.attn_norm.weight")
        state[f"{to}.post_attention_layernorm.weight"] = tensors.pop(f"{at}.post_attention_norm.weight")
        for part in ("gate", "up", "down"):
            state[f"{to}.mlp.{part}_proj.weight"] = tensors.pop(f"{at}.ffn_{part}.weight")
        if not each:
            for part, name in names.items():
                state[f"{to}.self_attn.{name}.weight"] = tensors.pop(f"{at}.attn_{part}.weight")
            continue
        delta = f"{to}.linear_attn"  # as many key heads as value heads, so that none lie apart
        assert said["ssm.group_count"] == said["ssm.time_step_rank"]
        state |= {
            f"{delta}.in_proj_qkv.weight": tensors.pop(f"{at}.attn_qkv.weight"),
            f"{delta}.in_proj_z.weight": tensors.pop(f"{at}.attn_gate.weight"),
            f"{delta}.in_proj_b.weight": tensors.pop(f"{at}.ssm_beta.weight"),
            f"{delta}.in_proj_a.weight": tensors.pop(f"{at}.ssm_alpha.weight"),
            f"{delta}.conv1d.weight": tensors.pop(f"{at}.ssm_conv1d.weight")[:, None],
            f"{delta}.dt_bias": tensors.pop(f"{at}.ssm_dt.bias"),
            f"{delta}.A_log": (-tensors.pop(f"{at}.ssm_a")).log(),
            f"{delta}.norm.weight": tensors.pop(f"{at}.ssm_norm.weight"),
            f"{delta}.out_proj.weight": tensors.pop(f"{at}.ssm_out.weight"),
        }
    return "qwen3_5_text", config, state


def _falcon(said, tensors, usual):
    state = {}
    sizes = _mamba_sizes(said)
    config = usual | sizes
    config |= {
        "num_key_value_heads": said["attention.head_count_kv"],
        "mamba_d_ssm": said["ssm.inner_size"],
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in tensors,
        "mamba_norm_before_gate": False,
    }
    for layer in range(usual["num_hidden_layers"]):
        at, to = f"blk.{layer}", f"model.layers.{layer}"
        state[f"{to}.input_layernorm.weight"] = tensors.pop(f"{at}.attn_norm.weight")
        state[f"{to}.pre_ff_layernorm.weight"] = tensors.pop(f"{at}.ffn_norm")
        for part in ("gate", "up", "down"):
            state[f"{to}.feed_forward.{part}_proj.weight"] = tensors.pop(f"{at}.ffn_{part}.weight")
        for part in ("q", "k", "v", "o"):
            name = f"{at}.attn_{'output' if part == 'o' else part}.weight"
            state[f"{to}.self_attn.{part}_proj.weight"] = tensors.pop(name)
        state |= _mamba(at, f"{to}.mamba", tensors, said)
    return "falcon_h1", config, state
