"""GGUF metadata -> `ModelConfig`. Pure; free of torch.

A key that changes what the model computes and is not supported is refused by name. Some properties have
no key: the tensors in the file show whether there are biases and a separate head, and which layers have
experts.

Sources: the keys are those of the `gguf` package's `constants.py`; their meaning and defaults are
llama.cpp's (`llama-model.cpp`: hyperparameters and graphs; `rope_yarn` of ggml).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from typing import Any

from base.errors import InputError
from models.config import (
    HEAD,
    MAX_EXPERTS,
    MAX_LAYERS,
    ModelConfig,
    Rope,
    check,
    head_dim_of,
    stretched_length,
)
from models.defaults import gguf_defaults
from models.keys import REQUIRED, Keys
from weights.formats.gguf_names import ARCHITECTURES, same_for_all_layers

_GEMMA = {"block": "gemma", "norm": "rms1p", "activation": "gelu_tanh"}
# The fields in which all models of an architecture differ from Llama.
_FIXED: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True},
    "qwen3moe": {"qk_norm": True},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | {"qk_norm": True},
    "falcon": {"block": "parallel", "norm": "layer", "activation": "gelu", "gated": False},
}
# The largest Gemmas, by number of layers: they scale queries by dim / heads, not by the head width.
_GEMMA_27B = {("gemma2", 46), ("gemma3", 62)}
# Keys of other architectures that can change the result, and the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "expert_gating_func": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.global.freq_base": (None,),  # another program's names for Gemma 3's
    "rope.local.freq_base": (None,),
    "use_parallel_residual": (True,),
}
_GRANITE = ("embedding_scale", "residual_scale", "logit_scale")


class _Metadata(Keys):
    """The keys of one architecture, without the prefix that is its name."""

    def __init__(self, values: Mapping[str, Any], architecture: str, source: str) -> None:
        found = {}
        for key in values:
            if key.startswith(architecture + "."):
                # A list holds one value per layer; only `_windows` supports that.
                short = key[len(architecture) + 1 :]
                keep = short == "attention.sliding_window_pattern"
                found[short] = values[key] if keep else same_for_all_layers(values, key, source)
        super().__init__(found, f"{source}, {architecture}", gguf_defaults(architecture))

    def number(self, key: str, if_none: float | None = None) -> float:
        """The shortest number that rounds to the stored float32: 9.99999975e-06 means 1e-5."""
        value = super().number(key, if_none)
        for digits in range(1, 10):
            short = float(f"{value:.{digits}g}")
            if _float32(short) == value:
                return short
        return value

    def number_or_zero(self, key: str) -> float:
        """A number; 0 if the key is missing or 0, which mean the same."""
        value = self.value(key)
        return 0.0 if value is None or value == 0 else self.number(key)


def _float32(value: float) -> float:
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.inf
    return rounded


def from_gguf(config: Mapping[str, Any], names: Collection[str], source: str) -> ModelConfig:
    """The `ModelConfig` of a GGUF file that holds weights of these canonical `names`. `config` has the
    file's key-values and the tensors of `weights.formats.gguf_names.FACTORS`. Raises InputError for
    what is not supported."""
    name = config.get("general.architecture", "llama")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{source}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    keys = _Metadata(config, name, source)
    try:
        return check(ModelConfig(**_fields(keys, name, config, names)))
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error


def _fields(
    keys: _Metadata, name: str, config: Mapping[str, Any], names: Collection[str]
) -> dict[str, Any]:
    dim, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length") or head_dim_of(dim, num_heads)
    keys.only("attention.value_length", (None, head_dim))
    for key, allowed in _NEUTRAL.items():
        keys.only(key, allowed)
    if name != "granite":
        for key in _GRANITE:
            keys.only(key, (1,))
    num_layers = keys.size("block_count", MAX_LAYERS)
    ffn_dim = keys.integer("feed_forward_length")
    fixed = _FIXED.get(name, {})
    norm = "layer_norm_epsilon" if fixed.get("norm") == "layer" else "layer_norm_rms_epsilon"
    context = keys.integer("context_length")
    rope = _rope(keys, config, head_dim, context)

    def has(weight: str) -> bool:
        return f"model.layers.0.{weight}" in names

    fields = fixed | {
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "ffn_dim": ffn_dim,
        "vocab_size": _vocab_size(keys, config),
        # Gemma 3's files hold the length after scaling.
        "max_seq_len": context if name == "gemma3" else stretched_length(rope, context),
        "rope": rope,
        "norm_eps": keys.number(f"attention.{norm}"),
        "tie_embeddings": HEAD not in names,
        "head_bias": "lm_head.bias" in names,
        "attention_bias": has("self_attn.q_proj.bias"),
        "attention_out_bias": has("self_attn.o_proj.bias"),
        "mlp_bias": has("mlp.down_proj.bias"),
        "two_norms": has("mlp_layernorm.weight"),
        "attention_scale": keys.number_or_zero("attention.scale"),
        "attention_cap": keys.number_or_zero("attn_logit_softcapping"),
        "logits_cap": keys.number_or_zero("final_logit_softcapping"),
    }
    fields |= _windows(keys, num_layers)
    fields |= _experts(keys, name, fields, names)
    fields |= _special(keys, name, fields)
    return fields


def _experts(
    keys: _Metadata, name: str, fields: Mapping[str, Any], names: Collection[str]
) -> dict[str, Any]:
    """The fields of a mixture of experts; none for a dense model."""
    num_experts = keys.size("expert_count", MAX_EXPERTS)
    if not num_experts:
        return {}
    used, ffn_dim = keys.integer("expert_used_count"), fields["ffn_dim"]
    # Without a key for the width: Qwen's experts of a token together have the dense layer's width.
    width = ffn_dim // max(used, 1) if name == "qwen3moe" else ffn_dim
    layers = range(fields["num_layers"])
    return {
        "num_experts": num_experts,
        "experts_per_token": used,
        "expert_dim": keys.integer("expert_feed_forward_length", width),
        "norm_topk": keys.flag("expert_weights_norm"),
        "dense_layers": tuple(i for i in layers if f"model.layers.{i}.mlp.gate.weight" not in names),
    }


def _special(keys: _Metadata, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only some architectures have, given those that are `known`."""
    fields: dict[str, Any] = {}
    if name == "granite":
        fields["embedding_scale"] = keys.number_or_zero("embedding_scale") or 1.0
        fields["residual_scale"] = keys.number_or_zero("residual_scale") or 1.0
        fields["logits_scale"] = 1 / (keys.number_or_zero("logit_scale") or 1.0)
    if name == "smollm3":  # there is no key for it: every fourth layer
        fields["no_rope"] = tuple(range(3, known["num_layers"], 4))
    if name in ("gemma2", "gemma3"):
        dim = known["dim"]
        fields["embedding_scale"] = math.sqrt(max(dim, 0))
        wide = (name, known["num_layers"]) in _GEMMA_27B
        scale = head_dim_of(dim, known["num_heads"]) if wide else known["head_dim"]
        fields["attention_scale"] = known["attention_scale"] or max(scale, 1) ** -0.5
    if name == "gemma3":
        fields["local_rope"] = Rope(keys.number("rope.freq_base_swa"), known["rope"].dim)
    return fields


def _vocab_size(keys: _Metadata, config: Mapping[str, Any]) -> int:
    tokens = config.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, list):
        raise InputError(f"{keys.source}: tokenizer.ggml.tokens must be a list of texts")
    return len(tokens) if tokens else keys.integer("vocab_size")


def _windows(keys: _Metadata, num_layers: int) -> dict[str, Any]:
    """The sliding window and its layers: all but the last of each period, or those that a list marks.
    Raises InputError for a list that is too short."""
    window = keys.size("attention.sliding_window", 1 << 40)
    key = "attention.sliding_window_pattern"
    pattern = keys.value(key)
    if isinstance(pattern, list):
        if len(pattern) < num_layers or not all(isinstance(has, bool | int) for has in pattern):
            raise InputError(f"{keys.source}: {key} must have an entry for each of {num_layers} layers")
        windowed = tuple(i for i in range(num_layers) if pattern[i])
    else:
        period = keys.size(key, MAX_LAYERS)
        windowed = tuple(i for i in range(num_layers) if period and (i + 1) % period)
        if not period:
            return {"window": window}  # all layers
    return {"window": window, "windowed": windowed} if window and windowed else {}


def _rope(keys: _Metadata, config: Mapping[str, Any], head_dim: int, context: int) -> Rope:
    """llama.cpp divides positions by the factor, except for "none", and then each frequency by its own
    factor. The factors in Llama 3.1's files hold for all lengths, so they serve as both the short and
    the long ones."""
    kind = keys.value("rope.scaling.type")
    factor = keys.number_or_zero("rope.scaling.factor") or keys.number_or_zero("rope.scale_linear") or 1
    rotary = keys.integer("rope.dimension_count", head_dim)
    attention = keys.number_or_zero("rope.scaling.attn_factor") or 1.0
    original = keys.integer("rope.scaling.original_context_length", context)
    more: dict[str, Any] = {}
    equal, short, long = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
    tensors = Keys(config, keys.source, dict.fromkeys((equal, short, long), REQUIRED))
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise InputError(
            f"{keys.source}: rotary scaling {kind!r} is not supported; supported: none, linear, yarn, "
            "longrope"
        )
    has_factors = any(name in config for name in (equal, short, long))
    if kind == "none":
        factor = 1.0
    if has_factors or kind == "longrope":
        if factor != 1 or kind == "yarn":
            raise InputError(
                f"{keys.source}: rotary scaling {kind!r} by {factor:g} together with a factor for each "
                "frequency is not supported"
            )
        if not has_factors:
            raise InputError(f"{keys.source}: rotary scaling 'longrope' needs the tensor {long}")
        if equal in config:
            short = long = equal
            original = context
        kind = "longrope"
        more = {"short_factors": tensors.numbers(short), "long_factors": tensors.numbers(long)}
    elif kind == "yarn":
        # The paper's temperature always applies; the factors of the keys multiply it.
        attention *= keys.number_or_zero("rope.scaling.yarn_attn_factor") or 1.0
        attention *= 1 + 0.1 * math.log(factor) if factor > 1 else 1
        more["beta_fast"] = keys.number_or_zero("rope.scaling.yarn_beta_fast") or 32.0
        more["beta_slow"] = keys.number_or_zero("rope.scaling.yarn_beta_slow") or 1.0
    elif kind == "none" or factor == 1:
        kind = "default"
    return Rope(
        theta=keys.number("rope.freq_base"),
        dim=0 if rotary == head_dim else rotary,
        kind=kind,
        factor=factor,
        original_max_seq_len=original if kind in ("yarn", "longrope") else 0,
        attention_factor=attention,
        **more,
    )
