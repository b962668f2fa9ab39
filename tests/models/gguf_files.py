"""GGUF files of Hugging Face folders as llama.cpp's converter writes them, without Yoke's code.

Tensor names are found by the `gguf` package's own table; metadata are written by its writer. What is
done to tensors restates `convert_hf_to_gguf.py`: rows permuted for Llama and what is derived from it,
1 added to Gemma's norms, Falcon's rows regrouped, experts stacked, rotary factors as tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "FalconForCausalLM": "falcon",
}
PERMUTED = ("llama", "granite", "smollm3")


def write(
    folder: Path,
    path: Path,
    *,
    stacked: bool = True,
    window: bool = False,
    kind: gguf.GGMLQuantizationType | None = None,
    split: int = 0,
) -> Path:
    """`stacked`: experts as newer files have them; `window`: write the key that the converter leaves
    out for Mistral; `kind`: of the matrices whose rows are whole blocks; `split`: so many tensors a
    file."""
    config = json.loads((folder / "config.json").read_text())
    name = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split)
    heads, kv_heads = config["num_attention_heads"], _kv_heads(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    _metadata(writer, name, config, heads, kv_heads, head_dim)
    if window:
        writer.add_sliding_window(config["sliding_window"])
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    if stacked:
        tensors = _stack(tensors)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for key, stored in tensors.items():
        value = stored
        if name in PERMUTED and ".q_proj." in key:
            value = _permute(value, heads)
        elif name in PERMUTED and ".k_proj." in key:
            value = _permute(value, kv_heads)
        elif name.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1
        elif "query_key_value" in key:
            value = _regroup(value, heads, kv_heads, head_dim)
        found = table.get_name(key, try_suffixes=(".weight", ".bias")) or _old_expert(key)
        assert found is not None, key
        array = np.ascontiguousarray(value.numpy())
        if kind is None or array.ndim == 1 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(found, array)
        else:
            writer.add_tensor(found, gguf.quants.quantize(array, kind), raw_dtype=kind)
    for key, values in _factors(config, head_dim).items():
        writer.add_tensor(key, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _kv_heads(config: dict[str, Any]) -> int:
    if "FalconForCausalLM" in config["architectures"]:
        return config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    return config["num_key_value_heads"]


def _metadata(
    writer: gguf.GGUFWriter, name: str, config: dict[str, Any], heads: int, kv_heads: int, head_dim: int
) -> None:
    def known(key: str, add: Callable[[Any], None]) -> None:
        if config.get(key) is not None:
            add(config[key])

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    if name == "falcon":
        writer.add_feed_forward_length(config["ffn_hidden_size"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        writer.add_tensor_data_layout("jploski")
        return
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if name == "phi3":
        writer.add_sliding_window(config["sliding_window"] or 0)
        share = config["rope_parameters"].get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(share * head_dim))
    elif config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if name in PERMUTED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if name != "gemma2":
        rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
        _rope(writer, rope, config["max_position_embeddings"])
    if name.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
        known("attn_logit_softcapping", writer.add_attn_logit_softcapping)
        known("final_logit_softcapping", writer.add_final_logit_softcapping)
    if name == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    known("num_local_experts", writer.add_expert_count)
    if name == "qwen3moe":
        known("num_experts", writer.add_expert_count)
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    known("num_experts_per_tok", writer.add_expert_used_count)


def _rope(writer: gguf.GGUFWriter, rope: dict[str, Any], trained: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    elif rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = trained / original
        assert scale > 1
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def _factors(config: dict[str, Any], head_dim: int) -> dict[str, list[float]]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    if rope.get("rope_type") != "llama3":
        return {}
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        original, low = rope["original_max_position_embeddings"], rope["low_freq_factor"]
        if wave < original / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wave - low) / (rope["high_freq_factor"] - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": factors}


def _permute(value: Tensor, heads: int) -> Tensor:
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _regroup(value: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    groups = value.view(kv_heads, heads // kv_heads + 2, head_dim, -1)
    parts = (groups[:, :-2], groups[:, [-2]], groups[:, [-1]])
    return torch.cat([part.reshape(-1, value.shape[1]) for part in parts])


def _stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's experts along a new first dimension, under one name."""
    result: dict[str, Tensor] = {}
    groups: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        if ".experts." not in key:
            result[key] = value
            continue
        before, after = key.split(".experts.")
        index, tail = after.split(".", 1)
        groups.setdefault(f"{before}.experts.{tail}", {})[int(index)] = value
    for key, experts in groups.items():
        result[key] = torch.stack([experts[i] for i in range(len(experts))])
    return result


def _old_expert(key: str) -> str | None:
    """blk.0.ffn_gate.3.weight, as the first files of Mixtral have it."""
    words = key.split(".")
    if "experts" not in words:
        return None
    name = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}[words[-2]]
    return f"blk.{words[2]}.{name}.{words[-3]}.weight"
