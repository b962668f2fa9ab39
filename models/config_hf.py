"""Hugging Face's `config.json` in the terms of `ModelConfig`. Pure; free of torch.

Each architecture is a function from the file's keys to the fields in which it differs from Llama. A key
that would change what the model computes, and is not understood, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from models.config import MAX_EXPERTS, MAX_LAYERS, ModelConfig, Rope, check, head_dim_of
from weights.errors import InputError


class Keys:
    """The keys of a file, read with their types; `source` is what errors call it."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{self.source}: {key} must be an integer, not {value!r}")
        if abs(value) >= 1 << 48:  # no size of anything, and too large to be computed with
            raise InputError(f"{self.source}: {key} must be below 2^48, not {str(value)[:100]}")
        return value

    def size(self, key: str, most: int, default: int | None = None) -> int:
        """An integer from 0 to `most`."""
        value = self.integer(key, default)
        if not 0 <= value <= most:
            raise InputError(f"{self.source}: {key}={value}: must be from 0 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{self.source}: {key} must be a number above 0, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in value
        ):
            raise InputError(f"{self.source}: {key} must be a list of numbers above 0")
        return tuple(float(x) for x in value)

    def only(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse a value that is not understood."""
        value = self.values.get(key)
        value = default if value is None else value
        if value not in allowed:
            names = ", ".join(map(repr, allowed))
            raise InputError(f"{self.source}: {key}={value!r} is not supported; supported: {names}")


_OTHERS = "; engine=hf runs any that has a tensor-parallel plan in the transformers library"


def from_hf(config: Mapping[str, Any], source: str) -> ModelConfig:
    """Read the keys of a Hugging Face `config.json`. Raises InputError for what is not supported."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{source}: architecture {name or architectures!r} is not supported; supported: "
            + ", ".join(ARCHITECTURES)
            + (_OTHERS if isinstance(config.get("model_type"), str) else "")
        )
    keys = Keys(config, source)
    try:
        return check(ModelConfig(**ARCHITECTURES[name](keys)))
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error


def _llama(keys: Keys) -> dict[str, Any]:
    """What all of Llama's descendants have in common."""
    dim, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", 0) or head_dim_of(dim, num_heads)
    bias = keys.flag("attention_bias")  # gives all four projections a bias
    activation = "hidden_activation" if "hidden_activation" in keys.values else "hidden_act"
    keys.only(activation, tuple(_ACTIVATIONS), "silu")
    num_layers, max_seq_len = keys.size("num_hidden_layers", MAX_LAYERS), _length(keys)
    return {
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "ffn_dim": keys.integer("intermediate_size"),
        "vocab_size": keys.integer("vocab_size"),
        "max_seq_len": max_seq_len,
        "rope": _rope(keys, _rope_keys(keys, "full_attention"), head_dim),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "activation": _ACTIVATIONS[keys.values.get(activation) or "silu"],
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": keys.flag("mlp_bias"),
    }


_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _length(keys: Keys, key: str = "max_position_embeddings") -> int:
    """What the model was trained for; a context that is stretched is as long as it says."""
    return keys.integer(key, 2048)


def _rope_keys(keys: Keys, layer_type: str) -> Mapping[str, Any]:
    """Newer files keep all rotary settings in one object (or one per type of layer), older ones have
    the base frequency beside the scaling."""
    rope = keys.values.get("rope_parameters") or keys.values.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and isinstance(rope.get(layer_type), Mapping):
        rope = rope[layer_type]
    if not isinstance(rope, Mapping):
        raise InputError(f"{keys.source}: the rotary settings must be an object, not {rope!r}")
    return rope


def _rope(keys: Keys, values: Mapping[str, Any], head_dim: int, theta: float = 10000.0) -> Rope:
    own = Keys(values, keys.source)
    kind = values.get("rope_type", values.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)  # as Phi-3's first files call it
    share = own.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    plain = Rope(
        theta=own.number("rope_theta", keys.number("rope_theta", theta)),
        dim=0 if share == 1 else int(head_dim * share),
    )
    if kind == "default":
        return plain
    trained = _length(keys)
    original = own.integer(
        "original_max_position_embeddings",
        keys.integer("original_max_position_embeddings", trained),
    )
    factor = own.number("factor", max(trained / max(original, 1), 1.0))
    more: dict[str, Any] = {}
    if kind == "dynamic":
        original = trained  # stretched from there on
    elif kind == "llama3":
        more = {key: own.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        more["attention_factor"] = _yarn_attention(own, factor)
        more["beta_fast"], more["beta_slow"] = own.number("beta_fast", 32), own.number("beta_slow", 1)
        more["truncate"] = own.flag("truncate", True)
    elif kind == "longrope":
        more["short_factors"], more["long_factors"] = (
            own.numbers("short_factor"),
            own.numbers("long_factor"),
        )
        if values.get("attention_factor") is not None:
            more["attention_factor"] = own.number("attention_factor")
        elif factor > 1 and original > 1:
            more["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original))
    kind = kind if isinstance(kind, str) else repr(kind)
    if kind != "linear":
        more["original_max_seq_len"] = original
    return replace(plain, kind=kind, factor=factor, **more)


def _yarn_attention(own: Keys, factor: float) -> float:
    """The temperature that YaRN folds into cos and sin; DeepSeek's `mscale` keys change it."""
    if own.values.get("attention_factor") is not None:
        return own.number("attention_factor")

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    if own.values.get("mscale") and own.values.get("mscale_all_dim"):
        return scale(own.number("mscale")) / scale(own.number("mscale_all_dim"))
    return scale(1)


def _windows(keys: Keys, used: bool = True) -> dict[str, Any]:
    """The sliding window, if `used`, of all layers or of those that `layer_types` tells."""
    types = keys.values.get("layer_types")
    if types is not None and (
        not isinstance(types, list) or set(types) - {"full_attention", "sliding_attention"}
    ):
        raise InputError(
            f"{keys.source}: layer_types must be a list of 'full_attention' and 'sliding_attention'"
        )
    window = keys.integer("sliding_window", 0) if used else 0
    if types is None:
        return {"window": window}
    layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    return {"window": window if layers else 0, "windowed": layers if window else ()}


def _mistral(keys: Keys) -> dict[str, Any]:
    return _llama(keys) | _windows(keys)


def _qwen2(keys: Keys) -> dict[str, Any]:
    config = _llama(keys) | {"attention_bias": True, "attention_out_bias": False}
    return config | _qwen_windows(keys, config["num_layers"])


def _qwen3(keys: Keys) -> dict[str, Any]:
    config = _llama(keys) | {"qk_norm": True}
    return config | _qwen_windows(keys, config["num_layers"])


def _qwen_windows(keys: Keys, num_layers: int) -> dict[str, Any]:
    """The layers from max_window_layers on have a window, if it is used at all."""
    used = keys.flag("use_sliding_window")
    windows = _windows(keys, used)
    if used and keys.values.get("layer_types") is None:
        windowed = tuple(range(min(keys.integer("max_window_layers", 28), num_layers), num_layers))
        windows = {"window": windows["window"] if windowed else 0, "windowed": windowed}
    return windows


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    # Its windows are all layers' or none's.
    config = _llama(keys) | {"qk_norm": True} | _windows(keys, keys.flag("use_sliding_window"))
    step, dense = keys.integer("decoder_sparse_step", 1), keys.values.get("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list):
        raise InputError(f"{keys.source}: decoder_sparse_step={step}, mlp_only_layers={dense!r}")
    experts = "num_experts" if "num_experts" in keys.values else "num_local_experts"
    return config | {
        "num_experts": keys.size(experts, MAX_EXPERTS),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "expert_dim": keys.integer("moe_intermediate_size"),
        "norm_topk": keys.flag("norm_topk_prob"),
        "dense_layers": tuple(i for i in range(config["num_layers"]) if i in dense or (i + 1) % step),
    }


def _mixtral(keys: Keys) -> dict[str, Any]:
    config = _llama(keys) | _windows(keys)
    return config | {
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "num_experts": keys.size("num_local_experts", MAX_EXPERTS),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "expert_dim": config["ffn_dim"],
    }


def _smollm3(keys: Keys) -> dict[str, Any]:
    config = _llama(keys)
    num_layers = config["num_layers"]
    rotary = keys.values.get("no_rope_layers")  # 1 for a layer that has rotary embeddings
    if rotary is None:
        every = keys.integer("no_rope_layer_interval", 4)
        rotary = [int((i + 1) % every != 0) for i in range(num_layers)]
    if not isinstance(rotary, list) or len(rotary) != num_layers:
        raise InputError(f"{keys.source}: no_rope_layers must have an entry for each layer")
    windows = _windows(keys, keys.flag("use_sliding_window"))
    return config | windows | {"no_rope": tuple(i for i, has in enumerate(rotary) if not has)}


def _phi3(keys: Keys) -> dict[str, Any]:
    # Phi's fused projections have no biases, whatever the keys of other families say.
    biases = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
    return _llama(keys) | _windows(keys) | biases | {"norm_eps": keys.number("rms_norm_eps", 1e-5)}


def _granite(keys: Keys) -> dict[str, Any]:
    return _llama(keys) | {
        "embedding_scale": keys.number("embedding_multiplier", 1.0),
        "residual_scale": keys.number("residual_multiplier", 1.0),
        "attention_scale": keys.number("attention_multiplier", 1.0),
        "logits_scale": 1 / keys.number("logits_scaling", 1.0),
    }


def _gemma2(keys: Keys) -> dict[str, Any]:
    config = _llama(keys)
    windows = _windows(keys)
    if keys.values.get("layer_types") is None:  # older files: every other layer, from the first
        windows["windowed"] = tuple(range(0, config["num_layers"], 2))
    if keys.values.get("use_bidirectional_attention"):
        raise InputError(f"{keys.source}: use_bidirectional_attention: only causal models are run")
    return (
        config
        | windows
        | {
            "block": "gemma",
            "norm": "rms1p",
            "activation": _ACTIVATIONS[keys.values.get("hidden_activation") or "gelu_pytorch_tanh"],
            "tie_embeddings": keys.flag("tie_word_embeddings", True),
            "embedding_scale": math.sqrt(config["dim"]),
            "attention_scale": keys.number("query_pre_attn_scalar", 256) ** -0.5,
            "attention_cap": _cap(keys, "attn_logit_softcapping"),
            "logits_cap": _cap(keys, "final_logit_softcapping"),
        }
    )


def _gemma3(keys: Keys) -> dict[str, Any]:
    config = _gemma2(keys) | {"qk_norm": True}
    num_layers, head_dim = config["num_layers"], config["head_dim"]
    if keys.values.get("layer_types") is None:  # five local layers, then a global one
        every = keys.integer("sliding_window_pattern", 6)
        config["windowed"] = tuple(i for i in range(num_layers) if (i + 1) % every)
    settings = keys.values.get("rope_parameters")
    if isinstance(settings, Mapping) and isinstance(settings.get("sliding_attention"), Mapping):
        local = settings["sliding_attention"]
    else:  # older files: the scaling is the global layers'
        local = {"rope_theta": keys.number("rope_local_base_freq", 10000.0)}
        config["rope"] = _rope(keys, _rope_keys(keys, "full_attention"), head_dim, 1e6)
    return config | {"local_rope": _rope(keys, local, head_dim)}


def _cap(keys: Keys, key: str) -> float:
    return 0.0 if keys.values.get(key) is None else keys.number(key)


def _gptj(keys: Keys) -> dict[str, Any]:
    keys.only("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    dim, num_heads = keys.integer("n_embd"), keys.integer("n_head")
    head_dim = head_dim_of(dim, num_heads)
    return {
        "dim": dim,
        "num_layers": keys.size("n_layer", MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "ffn_dim": keys.integer("n_inner", 4 * dim),
        "vocab_size": keys.integer("vocab_size"),
        "max_seq_len": _length(keys, "n_positions"),
        "rope": Rope(dim=keys.integer("rotary_dim", head_dim), interleaved=True),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "block": "parallel",
        "norm": "layer",
        "activation": "gelu_tanh",
        "gated": False,
        "mlp_bias": True,
        "head_bias": True,
    }


def _falcon(keys: Keys) -> dict[str, Any]:
    new = keys.flag("new_decoder_architecture")
    if keys.flag("alibi") or not (new or keys.flag("parallel_attn", True)):
        raise InputError(
            f"{keys.source}: this Falcon has ALiBi or attention before the MLP (falcon-rw); supported "
            "are those with rotary embeddings and parallel blocks"
        )
    keys.only("activation", ("gelu",), "gelu")
    dim, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = head_dim_of(dim, num_heads)
    many = num_heads if not keys.flag("multi_query", True) else 1
    return {
        "dim": dim,
        "num_layers": keys.size("num_hidden_layers", MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("num_kv_heads", num_heads) if new else many,
        "head_dim": head_dim,
        "ffn_dim": keys.integer("ffn_hidden_size", 4 * dim),
        "vocab_size": keys.integer("vocab_size"),
        "max_seq_len": _length(keys),
        "rope": _rope(keys, _rope_keys(keys, "full_attention"), head_dim),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
        "block": "parallel",
        "norm": "layer",
        "activation": "gelu",
        "gated": False,
        "attention_bias": keys.flag("bias"),
        "attention_out_bias": keys.flag("bias"),
        "mlp_bias": keys.flag("bias"),
        # Falcon 11B is of the newer kind and has one norm all the same.
        "two_norms": new and keys.integer("num_ln_in_parallel_attn", 2) == 2,
    }


ARCHITECTURES: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "SmolLM3ForCausalLM": _smollm3,
    "Phi3ForCausalLM": _phi3,
    "GraniteForCausalLM": _granite,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "GPTJForCausalLM": _gptj,
    "FalconForCausalLM": _falcon,
}
