"""What a model's dimensions are: presets by name, Hugging Face's `config.json`, GGUF metadata.

Free of torch, so that the launcher's side can refuse a job before any rank is started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weights.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder. `max_seq_len` is what the model was trained for.

    `family` names the module that holds its code, the flags at the end what its variants differ in:
    biases of query, key and value; of attention's output; of the MLP; norms of query and key heads.
    `rotary_dim` is how many numbers of a head are rotated, 0 for all.
    """

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
    family: str = "llama"
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rotary_dim: int = 0


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
        if value < 1 and name != "rotary_dim":
            raise InputError(f"{name}={value}: it must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2 or config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
        raise InputError(
            f"head_dim={config.head_dim}, rotary_dim={config.rotary_dim}: rotary embeddings need an "
            "even size, within the head's"
        )
    return config


def _head_dim(dim: int, num_heads: int) -> int:
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"dim={dim} is not a multiple of num_heads={num_heads}")
    return dim // num_heads


# What an architecture means beyond its config's own keys.
_LLAMA_LIKE: dict[str, dict[str, bool]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}
_GGUF_LIKE = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ARCHITECTURES = (*_LLAMA_LIKE, "GPTJForCausalLM")
_OTHERS = "; engine=hf runs any that has a tensor-parallel plan in the transformers library"


def from_hf(config: Mapping[str, Any], source: str) -> ModelConfig:
    """Read the keys of a Hugging Face `config.json`. Raises InputError for what is not supported."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if name == "GPTJForCausalLM":
        return _from_gptj(config, source)
    if name not in _LLAMA_LIKE:
        raise InputError(
            f"{source}: architecture {name or architectures!r} is not supported; supported: "
            + ", ".join(ARCHITECTURES)
            + (_OTHERS if isinstance(config.get("model_type"), str) else "")
        )
    # Newer files keep all rotary settings in one object, older ones spread them.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{source}: the rotary settings must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{source}: rotary scaling {kind!r} is not supported; supported: default")
    if config.get("use_sliding_window"):
        raise InputError(f"{source}: use_sliding_window=true is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{source}: hidden_act={config['hidden_act']!r}: only silu is supported")
    dim = _integer(config, "hidden_size", source)
    num_heads = _integer(config, "num_attention_heads", source)
    # Llama's and Qwen3's own key gives all four projections a bias.
    bias = bool(config.get("attention_bias", False))
    return check(
        ModelConfig(
            dim=dim,
            num_layers=_integer(config, "num_hidden_layers", source),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", source, num_heads),
            head_dim=_integer(config, "head_dim", source, 0) or _head_dim(dim, num_heads),
            ffn_dim=_integer(config, "intermediate_size", source),
            vocab_size=_integer(config, "vocab_size", source),
            max_seq_len=_integer(config, "max_position_embeddings", source, 2048),
            rope_theta=_number(rope, "rope_theta", source, _number(config, "rope_theta", source, 1e4)),
            norm_eps=_number(config, "rms_norm_eps", source, 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bias or _LLAMA_LIKE[name].get("attention_bias", False),
            attention_out_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=_LLAMA_LIKE[name].get("qk_norm", False),
        )
    )


def _from_gptj(config: Mapping[str, Any], source: str) -> ModelConfig:
    if config.get("activation_function", "gelu_new") != "gelu_new":
        activation = config["activation_function"]
        raise InputError(f"{source}: activation_function={activation!r}: only gelu_new is supported")
    dim, num_heads = _integer(config, "n_embd", source), _integer(config, "n_head", source)
    head_dim = _head_dim(dim, num_heads)
    return check(
        ModelConfig(
            dim=dim,
            num_layers=_integer(config, "n_layer", source),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            ffn_dim=_integer(config, "n_inner", source, 4 * dim),
            vocab_size=_integer(config, "vocab_size", source),
            max_seq_len=_integer(config, "n_positions", source, 2048),
            norm_eps=_number(config, "layer_norm_epsilon", source, 1e-5),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            family="gptj",
            mlp_bias=True,
            rotary_dim=_integer(config, "rotary_dim", source, head_dim),
        )
    )


def from_gguf(config: Mapping[str, Any], tie_embeddings: bool, source: str) -> ModelConfig:
    """Read the metadata of a GGUF file of a Llama-like architecture. Raises InputError."""
    name = config.get("general.architecture", "llama")
    if name not in _GGUF_LIKE:
        raise InputError(
            f"{source}: architecture {name!r} is not supported; supported: {', '.join(_GGUF_LIKE)}"
        )
    flags = _LLAMA_LIKE[_GGUF_LIKE[name]]
    scaling = config.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{source}: rotary scaling {scaling!r} is not supported; supported: none")
    dim = _integer(config, f"{name}.embedding_length", source)
    num_heads = _integer(config, f"{name}.attention.head_count", source)
    head_dim = _integer(config, f"{name}.attention.key_length", source, 0) or _head_dim(dim, num_heads)
    rotary = _integer(config, f"{name}.rope.dimension_count", source, head_dim)
    if rotary != head_dim:
        raise InputError(f"{source}: rotary embeddings over {rotary} of {head_dim} are not supported")
    return check(
        ModelConfig(
            dim=dim,
            num_layers=_integer(config, f"{name}.block_count", source),
            num_heads=num_heads,
            num_kv_heads=_integer(config, f"{name}.attention.head_count_kv", source, num_heads),
            head_dim=head_dim,
            ffn_dim=_integer(config, f"{name}.feed_forward_length", source),
            vocab_size=len(config.get("tokenizer.ggml.tokens", ()))
            or _integer(config, f"{name}.vocab_size", source),
            max_seq_len=_integer(config, f"{name}.context_length", source),
            rope_theta=float(config.get(f"{name}.rope.freq_base", 10000.0)),
            # Stored as float32: 1e-5 comes back as 9.99999975e-06, which is not what was meant.
            norm_eps=float(f"{config.get('llama.attention.layer_norm_rms_epsilon', 1e-5):.6g}"),
            tie_embeddings=tie_embeddings,
            attention_bias=flags.get("attention_bias", False),
            qk_norm=flags.get("qk_norm", False),
        )
    )


def _number(config: Mapping[str, Any], key: str, source: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{source}: {key} must be a number above 0, not {value!r}")
    return float(value)


def _integer(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{source}: {key} must be an integer, not {value!r}")
    return value


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and full shapes of all weights of a model."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    llama = config.family == "llama"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.dim)}

    def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if bias:
            shapes[f"{name}.bias"] = (out_features,)

    def norm(name: str, size: int = config.dim) -> None:
        shapes[f"{name}.weight"] = (size,)
        if not llama:
            shapes[f"{name}.bias"] = (size,)

    for i in range(config.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        norm(f"model.layers.{i}.input_layernorm")
        linear(f"{attention}.q_proj", q, config.dim, config.attention_bias)
        linear(f"{attention}.k_proj", kv, config.dim, config.attention_bias)
        linear(f"{attention}.v_proj", kv, config.dim, config.attention_bias)
        linear(f"{attention}.o_proj", config.dim, q, config.attention_out_bias)
        if config.qk_norm:
            norm(f"{attention}.q_norm", config.head_dim)
            norm(f"{attention}.k_norm", config.head_dim)
        if llama:
            norm(f"model.layers.{i}.post_attention_layernorm")
            linear(f"{mlp}.gate_proj", config.ffn_dim, config.dim, config.mlp_bias)
        linear(f"{mlp}.up_proj", config.ffn_dim, config.dim, config.mlp_bias)
        linear(f"{mlp}.down_proj", config.dim, config.ffn_dim, config.mlp_bias)
    norm("model.norm")
    if not config.tie_embeddings:
        linear("lm_head", config.vocab_size, config.dim, not llama)
    return shapes
