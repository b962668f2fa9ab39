"""Models by name, with their dimensions from the published configurations. Free of torch.

A preset gives the shapes for `weights=random`, for plans and for tables. Real weights come with their
own configuration.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from models.config import ModelConfig, Rope


def _model(*dims: int, **more: Any) -> ModelConfig:
    dim, num_layers, num_heads, num_kv_heads, head_dim, ffn_dim, vocab_size, max_seq_len = dims
    return ModelConfig(
        dim, num_layers, num_heads, num_kv_heads, head_dim, ffn_dim, vocab_size, max_seq_len, **more
    )


def _stretched(factor: float) -> Rope:
    return Rope(theta=500000.0, kind="llama3", factor=factor, original_max_seq_len=8192)


def _gemma2(*dims: int, query_scalar: int) -> ModelConfig:
    windowed = tuple(range(0, dims[1], 2))
    return _gemma(*dims, 256000, 8192, window=4096, windowed=windowed, query_scalar=query_scalar,
                  attention_cap=50.0, logits_cap=30.0)  # fmt: skip


def _gemma3(*dims: int, query_scalar: int, window: int, factor: float) -> ModelConfig:
    rope = Rope(theta=1e6, kind="default" if factor == 1 else "linear", factor=factor)
    windowed = tuple(i for i in range(dims[1]) if (i + 1) % 6)
    return _gemma(*dims, qk_norm=True, rope=rope, local_rope=Rope(), window=window,
                  windowed=windowed, query_scalar=query_scalar)  # fmt: skip


def _gemma(*dims: int, query_scalar: int, **more: Any) -> ModelConfig:
    return _model(*dims, norm_eps=1e-6, tie_embeddings=True, block="gemma", norm="rms1p",
                  activation="gelu_tanh", attention_scale=query_scalar**-0.5,
                  embedding_scale=dims[0] ** 0.5, **more)  # fmt: skip


_llama3 = partial(_model, rope=Rope(theta=500000.0))
_llama31 = partial(_model, rope=_stretched(8.0))
_llama32 = partial(_model, rope=_stretched(32.0), tie_embeddings=True)
_smollm2 = partial(_model, rope=Rope(theta=100000.0), tie_embeddings=True)
_qwen2 = partial(_model, rope=Rope(theta=1e6), norm_eps=1e-6, attention_bias=True)
_qwen3 = partial(_model, rope=Rope(theta=1e6), norm_eps=1e-6, qk_norm=True)
_granite = partial(_model, tie_embeddings=True, embedding_scale=12.0, residual_scale=0.22)
_parallel = partial(_model, block="parallel", norm="layer", gated=False)
_falcon = partial(_parallel, activation="gelu", tie_embeddings=True)

# name: dim, layers, heads, KV heads, head dim, MLP width, vocabulary, length
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(96, 2, 6, 2, 16, 256, 512, 2048),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 64, 1536, 49152, 8192),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 64, 2560, 49152, 8192),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 64, 8192, 49152, 8192, rope=Rope(theta=130000.0)),
    "smollm3-3b": ModelConfig(
        2048, 36, 16, 4, 128, 11008, 128256, 65536, rope=Rope(theta=5e6), norm_eps=1e-6,
        tie_embeddings=True, no_rope=tuple(range(3, 36, 4)),
    ),
    "llama-7b": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "llama-13b": ModelConfig(5120, 40, 40, 40, 128, 13824, 32000, 4096),
    "llama-70b": ModelConfig(8192, 80, 64, 8, 128, 28672, 32000, 4096),
    "llama-3-8b": _llama3(4096, 32, 32, 8, 128, 14336, 128256, 8192),
    "llama-3-70b": _llama3(8192, 80, 64, 8, 128, 28672, 128256, 8192),
    "llama-3.1-8b": _llama31(4096, 32, 32, 8, 128, 14336, 128256, 131072),
    "llama-3.1-70b": _llama31(8192, 80, 64, 8, 128, 28672, 128256, 131072),
    "llama-3.1-405b": _llama31(16384, 126, 128, 8, 128, 53248, 128256, 131072),
    "llama-3.2-1b": _llama32(2048, 16, 32, 8, 64, 8192, 128256, 131072),
    "llama-3.2-3b": _llama32(3072, 28, 24, 8, 128, 8192, 128256, 131072),
    "mistral-7b": ModelConfig(4096, 32, 32, 8, 128, 14336, 32768, 32768, rope=Rope(theta=1e6)),
    "mixtral-8x7b": ModelConfig(
        4096, 32, 32, 8, 128, 14336, 32000, 32768, rope=Rope(theta=1e6),
        num_experts=8, experts_per_token=2, expert_dim=14336,
    ),
    "mixtral-8x22b": ModelConfig(
        6144, 56, 48, 8, 128, 16384, 32768, 65536, rope=Rope(theta=1e6),
        num_experts=8, experts_per_token=2, expert_dim=16384,
    ),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 64, 4864, 151936, 32768, tie_embeddings=True),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 128, 8960, 151936, 32768, tie_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 128, 18944, 152064, 32768),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 128, 13824, 152064, 32768),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 128, 27648, 152064, 32768),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 128, 29568, 152064, 32768),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 128, 3072, 151936, 40960, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 128, 6144, 151936, 40960, tie_embeddings=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 128, 9728, 151936, 40960, tie_embeddings=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 128, 12288, 151936, 40960),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 128, 17408, 151936, 40960),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 128, 25600, 151936, 40960),
    "qwen3-30b-a3b": _qwen3(
        2048, 48, 32, 4, 128, 6144, 151936, 40960,
        num_experts=128, experts_per_token=8, expert_dim=768,
    ),
    "qwen3-235b-a22b": _qwen3(
        4096, 94, 64, 4, 128, 12288, 151936, 40960,
        num_experts=128, experts_per_token=8, expert_dim=1536,
    ),
    "phi-3-mini": ModelConfig(3072, 32, 32, 32, 96, 8192, 32064, 4096, window=2047),
    "phi-4": ModelConfig(5120, 40, 40, 10, 128, 17920, 100352, 16384, rope=Rope(theta=250000.0)),
    "granite-3.1-2b": _granite(
        2048, 40, 32, 8, 64, 8192, 49155, 131072, rope=Rope(theta=5e6),
        attention_scale=0.015625, logits_scale=1 / 8,
    ),
    "granite-3.1-8b": _granite(
        4096, 40, 32, 8, 128, 12800, 49155, 131072, rope=Rope(theta=1e7),
        attention_scale=0.0078125, logits_scale=1 / 16,
    ),
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 256, 9216, query_scalar=256),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 256, 14336, query_scalar=256),
    "gemma-2-27b": _gemma2(4608, 46, 32, 16, 128, 36864, query_scalar=144),
    "gemma-3-1b": _gemma3(
        1152, 26, 4, 1, 256, 6912, 262144, 32768, query_scalar=256, window=512, factor=1
    ),
    "gemma-3-4b": _gemma3(
        2560, 34, 8, 4, 256, 10240, 262208, 131072, query_scalar=256, window=1024, factor=8
    ),
    "gemma-3-12b": _gemma3(
        3840, 48, 16, 8, 256, 15360, 262208, 131072, query_scalar=256, window=1024, factor=8
    ),
    "gemma-3-27b": _gemma3(
        5376, 62, 32, 16, 128, 21504, 262208, 131072, query_scalar=168, window=1024, factor=8
    ),
    "gpt-j-6b": _parallel(
        4096, 28, 16, 16, 256, 16384, 50400, 2048, rope=Rope(dim=64, interleaved=True),
        activation="gelu_tanh", mlp_bias=True, head_bias=True,
    ),
    "falcon-7b": _falcon(4544, 32, 71, 1, 64, 18176, 65024, 2048),
    "falcon-40b": _falcon(8192, 60, 128, 8, 64, 32768, 65024, 2048, two_norms=True),
}  # fmt: skip
