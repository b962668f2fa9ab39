"""A small model as people bring it, and a text for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from models.config import ModelConfig, expected_shapes

# 12 rows of a key projection are no multiple of 8, 96 columns none of 64 or 128.
CONFIG = ModelConfig(
    dim=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=1,
    head_dim=12,
    ffn_dim=160,
    vocab_size=128,
    max_seq_len=512,
    norm_eps=1e-6,
    attention_bias=True,
    attention_out_bias=True,
)
TEXT = "A tug pulled a barge against the tide, and nobody asked why. What it carried was gravel.\n" * 12


def make_folder(folder: Path, tie_embeddings: bool = False) -> Path:
    """A Hugging Face folder of `CONFIG` with random weights in bfloat16 and a token for each character
    of ASCII. With tied embeddings all widths are multiples of 64."""
    wide = 128 if tie_embeddings else 96
    ffn = 192 if tie_embeddings else 160
    folder.mkdir()
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": wide,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": wide // CONFIG.num_heads,
        "intermediate_size": ffn,
        "vocab_size": CONFIG.vocab_size,
        "max_position_embeddings": CONFIG.max_seq_len,
        "attention_bias": True,
        "tie_word_embeddings": tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    config = ModelConfig(
        **{**vars(CONFIG), "dim": wide, "head_dim": wide // 8, "ffn_dim": ffn},
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if tie_embeddings and name == "lm_head.weight":
            continue
        values = torch.randn(shape, generator=generator)
        norm = name.endswith("norm.weight")
        # Sizes as trained models have them: neither does attention saturate, nor is a token certain.
        tensors[name] = 1 + 0.1 * values if norm else (values * wide**-0.5).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    vocab = {chr(i): i for i in range(128)}
    Tokenizer(models.BPE(vocab, [])).save(str(folder / "tokenizer.json"))
    return folder
