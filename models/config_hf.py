"""Hugging Face's `config.json` -> `ModelConfig`. Pure; free of torch.

Each architecture is a function from the file's keys to fields of `ModelConfig`. A key that changes what
the model computes and is not supported is refused by name. A missing key has the default of the model's
own class (`models.defaults`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from base.errors import InputError
from models.config import MAX_EXPERTS, MAX_LAYERS, ModelConfig, Rope, check, head_dim_of
from models.config_rope import LAYER_TYPES, PHI3_KINDS, read_rope, read_ropes
from models.defaults import ALIASES, DEFAULTS
from models.keys import Keys
from weights.nested import TEXT_MODELS, WRAPPERS, class_of, text_config


def from_hf(config: Mapping[str, Any], source: str) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`. Raises InputError for unsupported values."""
    config = text_config(config)
    name = class_of(config)
    if name is None:
        raise InputError(_not_supported(config, source))
    keys = Keys(_renamed(config, ALIASES.get(name, {})), source, DEFAULTS[name])
    try:
        return check(ModelConfig(**ARCHITECTURES[name](keys)))
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error


def _not_supported(config: Mapping[str, Any], source: str) -> str:
    names, kind = config.get("architectures"), config.get("model_type")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    shown = repr(name) if names else f"{name!r} (and model_type {kind!r})"
    others = "; engine=hf runs any that has a tensor-parallel plan in the transformers library"
    if isinstance(config.get("text_config"), Mapping):
        others = f"; and the text models inside these model_types: {', '.join(WRAPPERS)}"
    elif isinstance(kind, str) and kind in TEXT_MODELS:
        others = f"; a model of type {kind!r} needs an LM head, and this class has a different head"
    return f"{source}: architecture {shown} is not supported; supported: {', '.join(ARCHITECTURES)}" + (
        others if isinstance(kind, str) else ""
    )


def _renamed(values: Mapping[str, Any], aliases: Mapping[str, str]) -> Mapping[str, Any]:
    others = {aliases[key]: value for key, value in values.items() if key in aliases}
    return {**others, **values}


_Ropes = Callable[[Keys, int], dict[str, Any]]


def _common(keys: Keys, ropes: _Ropes = read_rope) -> dict[str, Any]:
    """The fields that Llama and its descendants share."""
    dim, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", 0) or head_dim_of(dim, num_heads)
    return {
        "dim": dim,
        "num_layers": keys.size("num_hidden_layers", MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "ffn_dim": keys.integer("intermediate_size"),
        "vocab_size": keys.integer("vocab_size"),
        "norm_eps": keys.number("rms_norm_eps"),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        **ropes(keys, head_dim),
    }


def _silu(keys: Keys, ropes: _Ropes = read_rope) -> dict[str, Any]:
    return _common(keys, ropes) | {"activation": _activation(keys, "hidden_act")}


def _llama(keys: Keys) -> dict[str, Any]:
    return _silu(keys) | _attention_bias(keys) | {"mlp_bias": keys.flag("mlp_bias")}


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _activation(keys: Keys, key: str) -> str:
    return _ACTIVATIONS[keys.only(key, tuple(_ACTIVATIONS))]


def _attention_bias(keys: Keys) -> dict[str, Any]:
    """The biases of all four attention projections."""
    bias = keys.flag("attention_bias")
    return {"attention_bias": bias, "attention_out_bias": bias}


def _layer_types(keys: Keys, num_layers: int) -> list[str] | None:
    types = keys.value("layer_types")
    if types is not None and (
        not isinstance(types, list)
        or len(types) != num_layers
        or any(kind not in LAYER_TYPES for kind in types)
    ):
        raise InputError(
            f"{keys.source}: layer_types must be a list of {' and '.join(map(repr, LAYER_TYPES))}, one "
            f"for each of {num_layers} layers"
        )
    return types


def _windows(keys: Keys, windowed: Callable[[], Iterable[int]], num_layers: int) -> dict[str, Any]:
    """The sliding window of the layers that `layer_types` names, or else of those in `windowed`."""
    types = _layer_types(keys, num_layers)
    if types is None:
        layers = tuple(windowed())
    else:
        layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    window = keys.integer("sliding_window", 0) if layers else 0
    return {"window": window, "windowed": layers if window else ()}


def _one_window(keys: Keys, num_layers: int, used: bool = True) -> dict[str, Any]:
    """The sliding window of all layers: these classes do not read `layer_types`."""
    window = keys.integer("sliding_window", 0) if used else 0
    wanted = "sliding_attention" if window else "full_attention"
    if any(kind != wanted for kind in _layer_types(keys, num_layers) or ()):
        raise InputError(
            f"{keys.source}: layer_types contradict sliding_window={window}: with it, this class uses "
            f"{wanted} in all layers"
        )
    return {"window": window}


def _mistral(keys: Keys) -> dict[str, Any]:
    config = _silu(keys)
    return config | _one_window(keys, config["num_layers"])


def _qwen2(keys: Keys) -> dict[str, Any]:
    config = _silu(keys) | {"attention_bias": True}
    return config | _qwen_windows(keys, config["num_layers"])


def _qwen3(keys: Keys) -> dict[str, Any]:
    config = _silu(keys) | _attention_bias(keys) | {"qk_norm": True}
    return config | _qwen_windows(keys, config["num_layers"])


def _qwen_windows(keys: Keys, num_layers: int) -> dict[str, Any]:
    """The window of the layers from max_window_layers on, if use_sliding_window is set."""
    if not keys.flag("use_sliding_window"):
        return {}
    return _windows(
        keys, lambda: range(keys.size("max_window_layers", MAX_LAYERS), num_layers), num_layers
    )


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    config = _silu(keys) | _attention_bias(keys) | {"qk_norm": True}
    num_layers = config["num_layers"]
    step, dense = keys.integer("decoder_sparse_step"), keys.value("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list):
        raise InputError(
            f"{keys.source}: decoder_sparse_step={step} must be at least 1, and "
            f"mlp_only_layers={dense!r} must be a list"
        )
    return (
        config
        | _one_window(keys, num_layers, keys.flag("use_sliding_window"))
        | {
            "num_experts": keys.size("num_experts", MAX_EXPERTS),
            "experts_per_token": keys.integer("num_experts_per_tok"),
            "expert_dim": keys.integer("moe_intermediate_size"),
            "norm_topk": keys.flag("norm_topk_prob"),
            "dense_layers": tuple(i for i in range(num_layers) if i in dense or (i + 1) % step),
        }
    )


def _mixtral(keys: Keys) -> dict[str, Any]:
    config = _silu(keys)
    return (
        config
        | _one_window(keys, config["num_layers"])
        | {
            "num_experts": keys.size("num_local_experts", MAX_EXPERTS),
            "experts_per_token": keys.integer("num_experts_per_tok"),
            "expert_dim": config["ffn_dim"],
        }
    )


def _smollm3(keys: Keys) -> dict[str, Any]:
    config = _llama(keys)
    num_layers = config["num_layers"]
    rotary = keys.value("no_rope_layers")  # 1 for a layer that has rotary embeddings
    if rotary is None:
        every = keys.integer("no_rope_layer_interval")
        if every < 1:
            raise InputError(f"{keys.source}: no_rope_layer_interval={every}: must be at least 1")
        rotary = [int((i + 1) % every != 0) for i in range(num_layers)]
    if not isinstance(rotary, list) or len(rotary) < num_layers:
        raise InputError(f"{keys.source}: no_rope_layers must have an entry for each layer")
    no_rope = tuple(i for i in range(num_layers) if not rotary[i])
    config["no_rope"] = no_rope
    if not keys.flag("use_sliding_window"):
        return config
    return config | _windows(keys, lambda: no_rope, num_layers)


def _phi3(keys: Keys) -> dict[str, Any]:
    config = _silu(
        keys, partial(read_rope, kinds=PHI3_KINDS)
    )  # never any biases, whatever the bias keys of other families say
    return config | _one_window(keys, config["num_layers"])


def _granite(keys: Keys) -> dict[str, Any]:
    return _llama(keys) | {
        "embedding_scale": keys.number("embedding_multiplier"),
        "residual_scale": keys.number("residual_multiplier"),
        "attention_scale": keys.number("attention_multiplier"),
        "logits_scale": 1 / keys.number("logits_scaling"),
    }


def _gemma(keys: Keys, ropes: _Ropes = read_rope) -> dict[str, Any]:
    if keys.flag("use_bidirectional_attention"):
        raise InputError(
            f"{keys.source}: use_bidirectional_attention is set, and only causal models are supported"
        )
    config = _common(keys, ropes)
    return (
        config
        | _attention_bias(keys)
        | {
            "block": "gemma",
            "norm": "rms1p",
            "activation": _activation(keys, "hidden_activation"),
            "embedding_scale": math.sqrt(max(config["dim"], 0)),
            "attention_scale": keys.number("query_pre_attn_scalar") ** -0.5,
            "attention_cap": _cap(keys, "attn_logit_softcapping"),
            "logits_cap": _cap(keys, "final_logit_softcapping"),
        }
    )


def _gemma2(keys: Keys) -> dict[str, Any]:
    config = _gemma(keys)
    num_layers = config["num_layers"]  # every other layer has a window, starting with the first
    return config | _windows(keys, lambda: range(0, num_layers, 2), num_layers)


def _gemma3(keys: Keys) -> dict[str, Any]:
    config = _gemma(keys, read_ropes)
    num_layers = config["num_layers"]

    def local() -> Iterable[int]:  # five local layers, then a global one
        every = keys.integer("sliding_window_pattern")
        if every < 1:
            raise InputError(f"{keys.source}: sliding_window_pattern={every}: must be at least 1")
        return (i for i in range(num_layers) if (i + 1) % every)

    return config | {"qk_norm": True} | _windows(keys, local, num_layers)


def _cap(keys: Keys, key: str) -> float:
    return 0.0 if keys.value(key) is None else keys.number(key)


def _gptj(keys: Keys) -> dict[str, Any]:
    keys.only("activation_function", ("gelu_new", "gelu_pytorch_tanh"))
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
        "max_seq_len": keys.integer("n_positions"),
        "rope": Rope(dim=keys.integer("rotary_dim"), interleaved=True),
        "norm_eps": keys.number("layer_norm_epsilon"),
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
    if keys.flag("alibi") or not (new or keys.flag("parallel_attn")):
        raise InputError(
            f"{keys.source}: this Falcon has ALiBi or attention before the MLP (falcon-rw); only "
            "Falcons with rotary embeddings and parallel blocks are supported"
        )
    keys.only("activation", ("gelu",))
    dim, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = head_dim_of(dim, num_heads)
    many = num_heads if not keys.flag("multi_query") else 1
    return {
        "dim": dim,
        "num_layers": keys.size("num_hidden_layers", MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("num_kv_heads", num_heads) if new else many,
        "head_dim": head_dim,
        "ffn_dim": keys.integer("ffn_hidden_size", 4 * dim),
        "vocab_size": keys.integer("vocab_size"),
        **read_rope(keys, head_dim),
        "norm_eps": keys.number("layer_norm_epsilon"),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "block": "parallel",
        "norm": "layer",
        "activation": "gelu",
        "gated": False,
        "attention_bias": keys.flag("bias"),
        "attention_out_bias": keys.flag("bias"),
        "mlp_bias": keys.flag("bias"),
        # Falcon 11B has the new architecture and still only one norm.
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
