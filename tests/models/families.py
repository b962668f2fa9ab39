"""Small random models of each family with odd head counts, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path

import torch

COMMON = {
    "num_hidden_layers": 2,
    "vocab_size": 301,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
}


def shape(heads: int, kv_heads: int, head_dim: int, ffn: int, **more: object) -> dict[str, object]:
    return COMMON | {
        "hidden_size": heads * 16,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        **more,
    }


def make(name: str) -> torch.nn.Module:
    """A model of transformers, in evaluation mode; the same at every call."""
    from transformers import (
        GPTJConfig,
        GPTJForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape(9, 3, 16, 101)))
    elif name == "llama-biases":
        model = LlamaForCausalLM(LlamaConfig(**shape(8, 1, 10, 96, attention_bias=True, mlp_bias=True)))
    elif name == "qwen2":
        config = shape(14, 2, 16, 90, tie_word_embeddings=True)
        del config["head_dim"]
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape(10, 5, 24, 77)))
    else:
        assert name == "gptj"
        model = GPTJForCausalLM(
            GPTJConfig(
                n_embd=9 * 16, n_layer=2, n_head=9, n_positions=64, rotary_dim=6, vocab_size=301,
                initializer_range=0.2, eos_token_id=None, bos_token_id=None,
            )
        )  # fmt: skip
    with torch.no_grad():  # what starts at zero or one would hide mistakes
        for _, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.3)
    return model.eval()


NAMES = ("llama", "llama-biases", "qwen2", "qwen3", "gptj")


def save(name: str, folder: Path) -> torch.nn.Module:
    model = make(name)
    model.save_pretrained(folder)
    return model
