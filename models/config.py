"""What a model's dimensions are: presets by name, Hugging Face's `config.json`, GGUF metadata.

Free of torch, so that the launcher's side can refuse a job before any rank is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weights.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a Llama-shaped decoder. `max_seq_len` is what the model was trained for."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(96, 2, 6, 2, 16, 256, 512, 2048),
    "smollm2-135m": ModelConfig(
        576, 30, 9, 3, 64, 1536, 49152, 8192, rope_theta=100000.0, tie_embeddings=True
    ),
    "llama-7b": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "llama-13b": ModelConfig(5120, 40, 40, 40, 128, 13824, 32000, 4096),
    "llama-70b": ModelConfig(8192, 80, 64, 8, 128, 28672, 32000, 4096),
    "llama-3-8b": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 8192, rope_theta=500000.0),
    "llama-3-70b": ModelConfig(8192, 80, 64, 8, 128, 28672, 128256, 8192, rope_theta=500000.0),
}

HEAD = "lm_head.weight"  # absent where the embedding serves as the head

OVERRIDES = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")


def override(config: ModelConfig, **changes: int | None) -> ModelConfig:
    """`config` with the given dimensions (None keeps one). Raises InputError if they do not fit."""
    given = {name: value for name, value in changes.items() if value is not None}
    changed = replace(config, **given)  # type: ignore[arg-type]
    if "dim" in given or "num_heads" in given:
        changed = replace(changed, head_dim=_head_dim(changed.dim, changed.num_heads))
    return check(changed)


def check(config: ModelConfig) -> ModelConfig:
    """`config`, if a model can have it. Raises InputError."""
    sizes = {name: value for name, value in vars(config).items() if type(value) is int}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}={value}: it must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"head_dim={config.head_dim}: rotary embeddings need an even size")
    return config


def _head_dim(dim: int, num_heads: int) -> int:
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"dim={dim} is not a multiple of num_heads={num_heads}")
    return dim // num_heads


def from_hf(config: Mapping[str, Any], source: str) -> ModelConfig:
    """Read the keys of a Hugging Face `config.json`. Raises InputError for what is not supported."""
    architectures = config.get("architectures") or ["(none)"]
    if architectures != ["LlamaForCausalLM"]:
        raise InputError(
            f"{source}: architecture {architectures[0]!r} is not supported; supported: LlamaForCausalLM"
        )
    # Newer files keep all rotary settings in one object, older ones spread them.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{source}: rotary scaling {kind!r} is not supported; supported: default")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise InputError(f"{source}: {key}=true is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{source}: hidden_act={config['hidden_act']!r}: only silu is supported")
    dim, num_heads = (
        _integer(config, "hidden_size", source),
        _integer(config, "num_attention_heads", source),
    )
    return check(
        ModelConfig(
            dim=dim,
            num_layers=_integer(config, "num_hidden_layers", source),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", source, num_heads),
            head_dim=config.get("head_dim") or _head_dim(dim, num_heads),
            ffn_dim=_integer(config, "intermediate_size", source),
            vocab_size=_integer(config, "vocab_size", source),
            max_seq_len=_integer(config, "max_position_embeddings", source, 2048),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    )


def from_gguf(config: Mapping[str, Any], tie_embeddings: bool, source: str) -> ModelConfig:
    """Read the metadata of a GGUF file of architecture `llama`. Raises InputError."""
    scaling = config.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{source}: rotary scaling {scaling!r} is not supported; supported: none")
    dim = _integer(config, "llama.embedding_length", source)
    num_heads = _integer(config, "llama.attention.head_count", source)
    head_dim = _integer(config, "llama.attention.key_length", source, _head_dim(dim, num_heads))
    rotary = _integer(config, "llama.rope.dimension_count", source, head_dim)
    if rotary != head_dim:
        raise InputError(f"{source}: rotary embeddings over {rotary} of {head_dim} are not supported")
    return check(
        ModelConfig(
            dim=dim,
            num_layers=_integer(config, "llama.block_count", source),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "llama.attention.head_count_kv", source, num_heads),
            head_dim=head_dim,
            ffn_dim=_integer(config, "llama.feed_forward_length", source),
            vocab_size=len(config.get("tokenizer.ggml.tokens", ()))
            or _integer(config, "llama.vocab_size", source),
            max_seq_len=_integer(config, "llama.context_length", source),
            rope_theta=float(config.get("llama.rope.freq_base", 10000.0)),
            # Stored as float32: 1e-5 comes back as 9.99999975e-06, which is not what was meant.
            norm_eps=float(f"{config.get('llama.attention.layer_norm_rms_epsilon', 1e-5):.6g}"),
            tie_embeddings=tie_embeddings,
        )
    )


def _integer(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{source}: {key} must be an integer, not {value!r}")
    return value


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and full shapes of all weights of a model."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.dim)}
    for i in range(config.num_layers):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (config.dim,),
            f"model.layers.{i}.self_attn.q_proj.weight": (q, config.dim),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, config.dim),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, config.dim),
            f"model.layers.{i}.self_attn.o_proj.weight": (config.dim, q),
            f"model.layers.{i}.post_attention_layernorm.weight": (config.dim,),
            f"model.layers.{i}.mlp.gate_proj.weight": (config.ffn_dim, config.dim),
            f"model.layers.{i}.mlp.up_proj.weight": (config.ffn_dim, config.dim),
            f"model.layers.{i}.mlp.down_proj.weight": (config.dim, config.ffn_dim),
        }
    shapes["model.norm.weight"] = (config.dim,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, config.dim)
    return shapes
