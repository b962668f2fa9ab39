"""GGUF metadata in the terms of `ModelConfig`. Pure; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, Rope, check, head_dim_of
from models.config_hf import Keys
from weights.errors import InputError

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}


def from_gguf(config: Mapping[str, Any], tie_embeddings: bool, source: str) -> ModelConfig:
    """Read the metadata of a GGUF file. Raises InputError for what is not supported."""
    name = config.get("general.architecture", "llama")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{source}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    keys = Keys(config, source)
    scaling = config.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{source}: rotary scaling {scaling!r} is not supported; supported: none")
    dim = keys.integer(f"{name}.embedding_length")
    num_heads = keys.integer(f"{name}.attention.head_count")
    head_dim = keys.integer(f"{name}.attention.key_length", 0) or head_dim_of(dim, num_heads)
    rotary = keys.integer(f"{name}.rope.dimension_count", head_dim)
    eps = keys.number(f"{name}.attention.layer_norm_rms_epsilon", 1e-5)
    return check(
        ModelConfig(
            dim=dim,
            num_layers=keys.integer(f"{name}.block_count"),
            num_heads=num_heads,
            num_kv_heads=keys.integer(f"{name}.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            ffn_dim=keys.integer(f"{name}.feed_forward_length"),
            vocab_size=len(config.get("tokenizer.ggml.tokens", ()))
            or keys.integer(f"{name}.vocab_size"),
            max_seq_len=keys.integer(f"{name}.context_length"),
            rope=Rope(
                keys.number(f"{name}.rope.freq_base", 10000.0), 0 if rotary == head_dim else rotary
            ),
            # Stored as float32: 1e-5 comes back as 9.99999975e-06, which is not what was meant.
            norm_eps=float(f"{eps:.6g}"),
            tie_embeddings=tie_embeddings,
            **ARCHITECTURES[name],
        )
    )
