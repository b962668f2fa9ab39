"""Convert Meta's `params.json` to the keys of Hugging Face's `config.json`. Pure; free of torch.

Some values are not in the file. The MLP's width and, if `vocab_size` is -1, the size of the vocabulary
come from the shapes of the weights. The trained length follows from the model's generation.

Source: `ModelArgs` of Meta's llama and llama3 repositories; the lengths and the scaling of long
contexts as in the published configs of the same models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.errors import InputError

EMBEDDING, GATE = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"


def hf_config(
    params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: Path
) -> dict[str, Any]:
    """The `config.json` of the model of `params`. `shapes` maps the stored names of its tensors to the
    shapes of the whole (unsplit) tensors; `source` is the path of params.json. Raises InputError."""
    if params.get("moe") is not None:
        raise InputError(f"{source} describes a mixture of experts ('moe'), which is not supported")
    for name in (EMBEDDING, GATE):
        if len(shapes.get(name, ())) != 2:
            raise InputError(
                f"{source}: the files beside it hold no matrix {name!r}; check that none is missing"
            )
    num_heads = count(params, "n_heads", source)
    dim = count(params, "dim", source)
    vocab_size = params.get("vocab_size")
    theta = number(params, "rope_theta", source, 10000.0)
    eps = number(params, "norm_eps", source, 1e-5)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "num_hidden_layers": count(params, "n_layers", source),
        "num_attention_heads": num_heads,
        "num_key_value_heads": count(params, "n_kv_heads", source, num_heads),
        "intermediate_size": shapes[GATE][0],
        "vocab_size": (
            shapes[EMBEDDING][0] if vocab_size in (-1, None) else count(params, "vocab_size", source)
        ),
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in shapes,
        "max_position_embeddings": _trained_length(params, shapes[EMBEDDING][0], theta, eps),
    }
    if params.get("head_dim") is not None:
        config["head_dim"] = count(params, "head_dim", source)
    if params.get("use_scaled_rope"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            # 8 in Llama 3.1; its small successors (1B, 3B) use 32, which their params.json omits.
            "factor": number(params, "rope_scaling_factor", source, 32.0 if dim < 4096 else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": number(params, "rope_high_freq_factor", source, 4.0),
            "original_max_position_embeddings": 8192,
        }
    return config


def _trained_length(params: Mapping[str, Any], vocab_size: int, theta: float, eps: float) -> int:
    if params.get("use_scaled_rope"):
        return 131072  # Llama 3.1 and later
    if vocab_size > 100000:
        return 8192  # Llama 3
    if theta >= 1e6:
        return 16384  # Code Llama
    return 2048 if eps == 1e-6 else 4096  # Llama 1, Llama 2: they differ in nothing else


def count(params: Mapping[str, Any], key: str, source: Path, default: int | None = None) -> int:
    """The positive integer `params[key]`, or `default`. Raises InputError."""
    value = params.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 1 << 32:
        raise InputError(f"{source}: {key} must be an integer above 0, not {value!r}")
    return value


def number(params: Mapping[str, Any], key: str, source: Path, default: float) -> float:
    """The positive finite number `params[key]`, or `default`. Raises InputError."""
    value = params.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{source}: {key} must be a number above 0, not {value!r}")
    return float(value)
