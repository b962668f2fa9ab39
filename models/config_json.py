"""`ModelConfig` -> Hugging Face's `config.json`, for models from GGUF files, which have none. Pure;
free of torch. This is the inverse of `models.config_hf`, and each result is checked against it: a model
that would read back differently is refused.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from base.errors import InputError
from models.config import ModelConfig, Rope
from models.config_hf import from_hf

# Hugging Face's class and model_type for each GGUF architecture.
_FAMILIES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "granite": ("GraniteForCausalLM", "granite"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_hf(config: ModelConfig, family: str, source: str) -> dict[str, Any]:
    """The keys of a config.json for a model of the GGUF architecture `family`. `source` names the model
    in errors. Raises InputError if the keys cannot describe the model."""
    if family not in _FAMILIES:
        raise InputError(
            f"{source}: a model of GGUF's architecture {family!r} cannot be written as a Hugging Face "
            f"folder; supported: {', '.join(_FAMILIES)}"
        )
    architecture, model_type = _FAMILIES[family]
    activation = "hidden_activation" if family.startswith("gemma") else "hidden_act"
    keys: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": _trained_length(config),
        "rms_norm_eps": config.norm_eps,
        activation: _ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        **_rope(config.rope, config.head_dim),
        **_windows(config),
    }
    if family == "granite":
        keys |= {
            "embedding_multiplier": config.embedding_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": 1 / config.logits_scale,
            "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        }
    if family == "phi3":  # its class reads the key outside the rotary settings
        keys["original_max_position_embeddings"] = (
            config.rope.original_max_seq_len or config.max_seq_len
        )
    if family == "smollm3":
        keys["no_rope_layers"] = [int(i not in config.no_rope) for i in range(config.num_layers)]
    if family.startswith("gemma"):
        keys |= {
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "attn_logit_softcapping": config.attention_cap or None,
            "final_logit_softcapping": config.logits_cap or None,
        }
    if config.local_rope is not None:
        keys["rope_local_base_freq"] = config.local_rope.theta
    if not same(asdict(from_hf(keys, source)), asdict(config)):
        raise InputError(
            f"{source}: its metadata describe a model that the config.json keys of {architecture} "
            "cannot describe; quantize it from the Hugging Face folder that it was made from"
        )
    return keys


def _trained_length(config: ModelConfig) -> int:
    """The length from which `stretched_length` computes the model's; Gemma 3's keys hold the scaled
    length."""
    if config.rope.kind == "linear" and config.local_rope is None:
        return round(config.max_seq_len / config.rope.factor)
    return config.max_seq_len


def _rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.dim:
        keys["partial_rotary_factor"] = rope.dim / head_dim
    if rope.kind == "default":
        return keys
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.original_max_seq_len:
        scaling["original_max_position_embeddings"] = rope.original_max_seq_len
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.kind in ("yarn", "longrope"):
        scaling["attention_factor"] = rope.attention_factor
    return keys | {"rope_scaling": scaling}


def _windows(config: ModelConfig) -> dict[str, Any]:
    if not config.window:
        return {"sliding_window": None}  # explicit, since the family's default may differ
    if not config.windowed:
        return {"sliding_window": config.window, "use_sliding_window": True}
    kinds = (config.is_windowed(i) for i in range(config.num_layers))
    types = ["sliding_attention" if windowed else "full_attention" for windowed in kinds]
    return {"sliding_window": config.window, "use_sliding_window": True, "layer_types": types}


def same(left: Any, right: Any) -> bool:
    """Whether both are equal, with floats compared to float32 precision."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) or isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)
