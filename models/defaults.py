"""The default of every key that a file may leave out: one table for each family, as plain data.

Model files often omit keys whose value is the default of their class. So each family has the defaults
of its own class, sizes too: a file without `num_attention_heads` is read as the class would read it.
A size that does not fit the weights is refused when they are loaded. Every key that a reader reads has
an entry; a test compares each with transformers' configuration classes. None: no such thing (a window,
a cap), or computed from other keys (the head width).

GGUF's defaults are those of llama.cpp; keys without a default are `REQUIRED`. Free of torch and
transformers.
"""

from __future__ import annotations

from typing import Any

from models.keys import REQUIRED

# Keys that all but GPT-J and Falcon have.
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,  # not read by the class
    "original_max_position_embeddings": None,
}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_MISTRAL: dict[str, Any] = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "use_bidirectional_attention": None,
}
_GEMMA_COMMON = {key: value for key, value in _COMMON.items() if key != "hidden_act"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _COMMON | _BIASES,
    "MistralForCausalLM": _COMMON | _MISTRAL,
    "Qwen2ForCausalLM": _COMMON | _QWEN,
    "Qwen3ForCausalLM": _COMMON | _QWEN | {"head_dim": 128, "attention_bias": False},
    "SmolLM3ForCausalLM": _COMMON
    | _BIASES
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "Phi3ForCausalLM": _COMMON
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
        "layer_types": None,
    },
    "GraniteForCausalLM": _COMMON
    | _BIASES
    | {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "Gemma2ForCausalLM": _GEMMA_COMMON
    | _GEMMA
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": _GEMMA_COMMON
    | _GEMMA
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    },
    "MixtralForCausalLM": _COMMON
    | _MISTRAL
    | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen3MoeForCausalLM": _COMMON
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "layer_types": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    "GPTJForCausalLM": {
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_inner": None,  # 4 * n_embd
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    "FalconForCausalLM": {
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": None,  # as many as query heads
        "ffn_hidden_size": None,  # 4 * hidden_size
        "num_ln_in_parallel_attn": None,  # 2 with the new architecture
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": None,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "partial_rotary_factor": None,
        "original_max_position_embeddings": None,
    },
}
# Other names that a class accepts for its keys.
ALIASES: dict[str, dict[str, str]] = {
    "MixtralForCausalLM": {"num_experts": "num_local_experts"},
    "Qwen3MoeForCausalLM": {"num_local_experts": "num_experts"},
    "GPTJForCausalLM": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
}

# The object of rotary settings: the keys that each kind reads.
_ROPE: dict[str, Any] = {"rope_theta": None, "partial_rotary_factor": None}  # the keys outside of it
_ORIGINAL = {"original_max_position_embeddings": None}  # max_position_embeddings
ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "default": _ROPE,
    "linear": _ROPE | {"factor": REQUIRED},
    "dynamic": _ROPE | {"factor": REQUIRED},
    "llama3": _ROPE
    | _ORIGINAL
    | {"factor": REQUIRED, "low_freq_factor": REQUIRED, "high_freq_factor": REQUIRED},
    "yarn": _ROPE
    | _ORIGINAL
    | {
        "factor": REQUIRED,
        "attention_factor": None,  # follows from the factor
        "beta_fast": None,  # 32
        "beta_slow": None,  # 1
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
    "longrope": _ROPE
    | _ORIGINAL
    | {
        "short_factor": REQUIRED,
        "long_factor": REQUIRED,
        "factor": None,  # max_position_embeddings / original_max_position_embeddings
        "attention_factor": None,
    },
}
# Keys that a kind does not read, and the values with which they change nothing; None: any value.
ROPE_NEUTRAL: dict[str, float | None] = {
    "factor": 1,
    "attention_factor": 1,
    "attn_factor": 1,
    "extrapolation_factor": 1,
    "finetuned": None,
    "mrope_section": None,  # for images; the positions of text are the same in all sections
    "mrope_interleaved": None,
}

# GGUF's keys without the architecture's prefix. 0: no such thing, or computed from other keys.
_GGUF: dict[str, Any] = {
    "vocab_size": REQUIRED,  # only read if the file lists no tokens
    "context_length": REQUIRED,
    "embedding_length": REQUIRED,
    "block_count": REQUIRED,
    "feed_forward_length": REQUIRED,
    "attention.head_count": REQUIRED,
    "attention.head_count_kv": None,  # as many as query heads
    "attention.key_length": 0,  # embedding_length / attention.head_count
    "attention.value_length": None,
    "attention.layer_norm_epsilon": REQUIRED,  # a model reads this key or the next
    "attention.layer_norm_rms_epsilon": REQUIRED,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.sliding_window_pattern": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": REQUIRED,  # only read if there are experts
    "expert_feed_forward_length": None,
    "expert_weights_norm": True,
    "rope.freq_base": 10000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.dimension_count": None,
    "rope.scale_linear": 0.0,  # an older name of rope.scaling.factor
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.original_context_length": None,  # context_length
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    # Keys of other architectures, with the values that change nothing.
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "expert_gating_func": 0,
    "expert_shared_count": 0,
    "expert_weights_scale": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "rope.global.freq_base": None,
    "rope.local.freq_base": None,
    "use_parallel_residual": True,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
}
_GGUF_OF: dict[str, dict[str, Any]] = {
    "granite": {"logit_scale": REQUIRED},
    "gemma2": {
        "attention.sliding_window": 4096,
        "attention.sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {"attention.sliding_window_pattern": 6},
}


def gguf_defaults(architecture: str) -> dict[str, Any]:
    """The defaults of a GGUF architecture's keys."""
    return _GGUF | _GGUF_OF.get(architecture, {})
