"""A model's dimensions as the metadata of a GGUF file. Pure.

This is the inverse of `models.config_gguf`, and each result is read back by it: a model that would be
read differently is refused. Rotary frequencies are compared as numbers, since a file may state them as
a kind of scaling or as factors.

Sources: the keys are those of the `gguf` package's `constants.py`; which of them an architecture reads
is llama.cpp's (`llama-model.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import torch

from base.errors import InputError
from models.config import ModelConfig, Rope
from models.config_gguf import from_gguf
from models.config_json import same
from models.families import FAMILIES
from models.rope import frequencies
from weights.nested import class_of, text_config

Keys = dict[str, Any]
# The architectures that are written from other files than GGUF, by the class in config.json.
WRITTEN = {family.hf: family.gguf for family in FAMILIES if family.read_gguf not in ("", "falcon")}


def architecture_of(keys: Any, source: str) -> str:
    """The GGUF architecture of the model with these keys of config.json. Raises InputError."""
    name = class_of(text_config(keys))
    if name not in WRITTEN:
        raise InputError(
            f"{source}: a model of class {name} cannot be written as GGUF; supported: "
            f"{', '.join(WRITTEN)}; write a folder instead: quant=int8 or quant=int4-g32"
        )
    return WRITTEN[name]


def metadata_of(config: ModelConfig, architecture: str) -> tuple[Keys, dict[str, list[float]]]:
    """The keys of a GGUF file of this architecture, and the settings that are tensors of their own:
    factors of rotary frequencies."""
    keys: Keys = {
        "block_count": config.num_layers,
        "context_length": _trained_length(config),
        "embedding_length": config.dim,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.rope.dim or config.head_dim,
        "rope.freq_base": config.rope.theta,
        **_windows(config, architecture),
    }
    if config.attention_cap:
        keys["attn_logit_softcapping"] = config.attention_cap
    if config.logits_cap:
        keys["final_logit_softcapping"] = config.logits_cap
    if config.num_experts:
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.experts_per_token,
            "expert_feed_forward_length": config.expert_dim,
            "expert_weights_norm": config.norm_topk,
        }
    if architecture == "granite":
        keys |= {
            "attention.scale": config.attention_scale,
            "embedding_scale": config.embedding_scale,
            "residual_scale": config.residual_scale,
            "logit_scale": 1 / config.logits_scale,
        }
    if config.local_rope is not None:
        keys["rope.freq_base_swa"] = config.local_rope.theta
    scaling, factors = _scaling(config.rope, config.head_dim)
    named = {f"{architecture}.{key}": value for key, value in (keys | scaling).items()}
    return {"general.architecture": architecture} | named, factors


def check_read_back(config: ModelConfig, keys: Keys, names: Collection[str], source: str) -> None:
    """Raise InputError unless a file with these keys and factors, and weights of these canonical names,
    is read as this model."""
    found = from_gguf(keys, names, source)
    left, right = asdict(found), asdict(config)
    ropes = [(left.pop(key), right.pop(key)) for key in ("rope", "local_rope")]
    scales = [(config.attention_scale or config.head_dim**-0.5) for config in (found, config)]
    left["attention_scale"], right["attention_scale"] = scales
    wrong = [key for key in left if not same(left[key], right[key])]
    for one, other in ropes:
        if (one is None) != (other is None) or (
            one is not None and not _same_rope(Rope(**one), Rope(**other), config)
        ):
            wrong.append("rope")
    if "qwen3moe" in str(keys["general.architecture"]) and not config.norm_topk:
        wrong.append("norm_topk")  # there is a key, but llama.cpp does not read it
    if wrong:
        raise InputError(
            f"{source}: its settings cannot be written as GGUF, which describes "
            f"{', '.join(wrong)} otherwise; write a folder instead: quant=int8 or quant=int4-g32"
        )


def _same_rope(one: Rope, other: Rope, config: ModelConfig) -> bool:
    size, longest = config.head_dim, config.max_seq_len
    if (one.interleaved, one.dim or size) != (other.interleaved, other.dim or size):
        return False
    return math.isclose(one.attention_factor, other.attention_factor, rel_tol=1e-5) and all(
        torch.allclose(frequencies(one, size, length), frequencies(other, size, length), rtol=1e-5)
        for length in (1, other.original_max_seq_len or longest, longest, longest + 1)
    )


def _trained_length(config: ModelConfig) -> int:
    """The length before linear scaling; Gemma 3's files have the one after it."""
    if config.rope.kind == "linear" and config.local_rope is None:
        return round(config.max_seq_len / config.rope.factor)
    return config.max_seq_len


def _windows(config: ModelConfig, architecture: str) -> Keys:
    if not config.window:  # llama.cpp requires the key of Phi 3
        return {"attention.sliding_window": 0} if architecture == "phi3" else {}
    keys: Keys = {"attention.sliding_window": config.window}
    if config.windowed and not architecture.startswith("gemma"):  # Gemma's layers are known
        layers = [config.is_windowed(i) for i in range(config.num_layers)]
        keys["attention.sliding_window_pattern"] = layers
    return keys


def _scaling(rope: Rope, head_dim: int) -> tuple[Keys, dict[str, list[float]]]:
    if rope.kind == "llama3":
        plain = frequencies(Rope(rope.theta, rope.dim), head_dim, 1)
        factors = (plain / frequencies(rope, head_dim, 1)).tolist()
        return {}, {"rope_freqs.weight": factors}
    if rope.kind == "longrope":
        keys: Keys = {
            "rope.scaling.original_context_length": rope.original_max_seq_len,
            "rope.scaling.attn_factor": rope.attention_factor,
        }
        names = ("rope_factors_long.weight", "rope_factors_short.weight")
        return keys, dict(zip(names, map(list, (rope.long_factors, rope.short_factors)), strict=True))
    if rope.kind not in ("linear", "yarn"):
        return {}, {}  # "dynamic" has no key: check_read_back refuses it
    keys = {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind == "yarn":
        usual = 1 + 0.1 * math.log(rope.factor) if rope.factor > 1 else 1.0
        keys |= {
            "rope.scaling.original_context_length": rope.original_max_seq_len,
            "rope.scaling.attn_factor": rope.attention_factor / usual,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
    return keys, {}
