"""Small random models of each family with odd head counts, made and saved by transformers.

Each entry is a configuration of transformers; what it is to show stands beside it. Windows and trained
lengths are shorter than the texts of the tests, so that they matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON = {
    "num_hidden_layers": 2,
    "vocab_size": 301,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0 + i / 10 for i in range(6)],
    "long_factor": [1.5 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
}
SLIDING = ["sliding_attention", "full_attention"]
# name: (transformers' class without "ForCausalLM", query heads, KV heads, head size, MLP width, more)
FAMILIES: dict[str, tuple[str, int, int, int, int, dict[str, Any]]] = {
    "llama": ("Llama", 9, 3, 16, 101, {}),
    "llama-biases": ("Llama", 8, 1, 10, 96, {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": ("Llama", 6, 2, 16, 64, {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama", 4, 4, 16, 64,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-dynamic": (
        "Llama", 4, 2, 16, 64,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-yarn": ("Llama", 5, 1, 16, 64, {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", 6, 3, 16, 64, {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "mistral": ("Mistral", 8, 2, 12, 80, {"sliding_window": 7}),
    "qwen2": ("Qwen2", 14, 2, 16, 90, {"tie_word_embeddings": True, "head_dim": None}),
    "qwen2-window": (
        "Qwen2", 4, 2, 16, 64,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "head_dim": None},
    ),
    "qwen3": ("Qwen3", 10, 5, 24, 77, {}),
    "phi3": ("Phi3", 6, 2, 16, 72, {"sliding_window": 9, "head_dim": None}),
    "phi4-mini": (
        "Phi3", 6, 3, 16, 64,
        # The key of the configuration itself counts before that of the rotary settings.
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "head_dim": None},
    ),
    "granite": (
        "Granite", 6, 2, 16, 64,
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3,
         "logits_scaling": 2.0, "head_dim": None},
    ),
    "gemma2": (
        "Gemma2", 4, 2, 24, 70,
        {"sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": SLIDING,
         "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3", 6, 1, 16, 66,
        {"sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": SLIDING},
    ),
    "mixtral": (
        "Mixtral", 6, 2, 16, 44, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    ),
    "qwen3-moe": (
        "Qwen3Moe", 4, 2, 20, 52,
        {"num_hidden_layers": 3, "num_experts": 5, "num_experts_per_tok": 2,
         "moe_intermediate_size": 36, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "gptj": ("GPTJ", 9, 9, 16, 576, {}),
    "falcon": ("Falcon", 7, 1, 16, 448, {}),
    "falcon-new": ("Falcon", 12, 4, 16, 100, {"new_decoder_architecture": True, "bias": True}),
    "falcon-11b": (
        "Falcon", 8, 2, 16, 128,
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    ),
}  # fmt: skip
NAMES = tuple(FAMILIES)


def make(name: str, **changes: Any) -> Any:
    """A model of transformers, in evaluation mode; the same at every call. `changes` to the keys of its
    configuration; None takes transformers' default."""
    family, heads, kv_heads, head_dim, ffn, more = FAMILIES[name]
    values: dict[str, Any] = COMMON | {
        "hidden_size": heads * 16,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
    }
    more = more | changes
    values = {
        key: value for key, value in (values | more).items() if key not in more or value is not None
    }
    if family == "GPTJ":
        values = COMMON | {
            "n_embd": 144,
            "n_layer": 2,
            "n_head": heads,
            "n_positions": 64,
            "rotary_dim": 6,
        }
    elif family == "Falcon":
        values["num_kv_heads"] = kv_heads
        values["ffn_hidden_size"] = ffn
        for key in ("num_key_value_heads", "head_dim", "intermediate_size"):
            del values[key]
    return build(family, values)


def build(family: str, values: dict[str, Any]) -> Any:
    """A random model of the class, of these keys."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config(**values))
    with torch.no_grad():  # what starts at zero or one would hide mistakes
        for _, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.3)
    return model.eval()


def save(name: str, folder: Path, **changes: Any) -> Any:
    model = make(name, **changes)
    model.save_pretrained(folder)
    return model


LENGTHS = (9, 4, 12)  # of the prompts of a batch
STEPS = 20


def tokens() -> torch.Tensor:
    """The texts of a batch, of which the first `LENGTHS` tokens are the prompts."""
    shape = (len(LENGTHS), max(LENGTHS) + STEPS)
    return torch.randint(0, 301, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def wanted(model: torch.nn.Module) -> torch.Tensor:
    """What transformers makes of each text by itself: logits after the prompt and each of the next
    `STEPS` tokens, [3, STEPS + 1, vocab]."""
    rows = []
    for text, length in zip(tokens(), LENGTHS, strict=True):
        logits = model(text[None, : length + STEPS], use_cache=False).logits
        rows.append(logits[0, length - 1 : length + STEPS])
    return torch.stack(rows)


@torch.no_grad()
def run(model: Any, rows: slice = slice(None), steps: int = STEPS) -> torch.Tensor:
    """The same of our model: the prompts in one padded batch, then token by token over the padding,
    each row at its own position."""
    texts, lengths = tokens()[rows], torch.tensor(LENGTHS[rows])
    model.setup(len(texts), 32)
    prompt = texts[:, :16].clone()
    prompt[torch.arange(16) >= lengths[:, None]] = 0
    logits = [model(prompt, torch.arange(16), lengths - 1)]
    for i in range(steps):
        positions = (lengths + i)[:, None]
        logits.append(model(texts.gather(1, positions), positions))
    return torch.stack(logits, dim=1)


def largest_difference(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (logits - wanted).abs().max().item()
