"""Small checkpoints to reshard, in the formats that people bring, and how to look at them whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from models.config import ModelConfig, expected_shapes
from reshard import command

Kind = gguf.GGMLQuantizationType
SMALL = ModelConfig(
    dim=64,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=4,
    ffn_dim=96,
    vocab_size=37,
    max_seq_len=64,
)


def run(*words: object) -> None:
    assert command.main([str(word) for word in words]) == 0


def small(num_heads: int, num_kv_heads: int, ffn_dim: int = 96, vocab_size: int = 37) -> ModelConfig:
    return replace(
        SMALL, num_heads=num_heads, num_kv_heads=num_kv_heads, ffn_dim=ffn_dim, vocab_size=vocab_size
    )


def hf_config(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
    }


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights of which no two parts are alike; the norms are kept in float32."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = values if len(shape) == 1 else values.to(dtype)
    return tensors


def write_hf(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=1))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file(tensors or random_tensors(config), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_meta(folder: Path, world_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Path:
    """Meta's files as Llama 2 has them: the embedding split by columns, the norms in every file."""
    folder.mkdir()
    dim, ffn, vocab = num_heads * head_dim, 3 * num_heads * head_dim, 48
    kv = num_kv_heads * head_dim
    generator = torch.Generator().manual_seed(1)
    full: dict[str, tuple[torch.Tensor, int | None]] = {}

    def add(name: str, shape: tuple[int, ...], split: int | None) -> None:
        full[name] = (torch.randn(shape, generator=generator).bfloat16(), split)

    add("tok_embeddings.weight", (vocab, dim), 1)
    add("norm.weight", (dim,), None)
    add("output.weight", (vocab, dim), 0)
    for i in range(2):
        for name, shape, split in (
            ("attention.wq", (dim, dim), 0),
            ("attention.wk", (kv, dim), 0),
            ("attention.wv", (kv, dim), 0),
            ("attention.wo", (dim, dim), 1),
            ("feed_forward.w1", (ffn, dim), 0),
            ("feed_forward.w2", (dim, ffn), 1),
            ("feed_forward.w3", (ffn, dim), 0),
            ("attention_norm", (dim,), None),
            ("ffn_norm", (dim,), None),
        ):
            add(f"layers.{i}.{name}.weight", shape, split)
    for rank in range(world_size):
        parts = {
            name: tensor if split is None else tensor.chunk(world_size, split)[rank].clone()
            for name, (tensor, split) in full.items()
        }
        torch.save(parts, folder / f"consolidated.{rank:02}.pth")
    params = {
        "dim": dim,
        "n_layers": 2,
        "n_heads": num_heads,
        "n_kv_heads": num_kv_heads,
        "vocab_size": -1,
        "norm_eps": 1e-5,
    }
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(b"not really")
    return folder


def write_gguf(path: Path, config: ModelConfig, kinds: dict[str, Kind], other: Kind) -> Path:
    """A GGUF file whose matrices are stored as `kinds` (by llama.cpp's short names), or as `other`.
    The blocks are random bytes: nothing here looks at their values."""
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_context_length(config.max_seq_len)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"token_embd": (config.vocab_size, config.dim), "output": (config.vocab_size, config.dim)}
    for i in range(config.num_layers):
        shapes |= {
            f"blk.{i}.attn_q": (q, config.dim),
            f"blk.{i}.attn_k": (kv, config.dim),
            f"blk.{i}.attn_v": (kv, config.dim),
            f"blk.{i}.attn_output": (config.dim, q),
            f"blk.{i}.ffn_gate": (config.ffn_dim, config.dim),
            f"blk.{i}.ffn_up": (config.ffn_dim, config.dim),
            f"blk.{i}.ffn_down": (config.dim, config.ffn_dim),
        }
        for norm in ("attn_norm", "ffn_norm"):
            values = rng.standard_normal(config.dim).astype(np.float32)
            writer.add_tensor(f"blk.{i}.{norm}.weight", values)
    writer.add_tensor("output_norm.weight", rng.standard_normal(config.dim).astype(np.float32))
    for name, (rows, columns) in shapes.items():
        kind = kinds.get(name.split(".")[-1], other)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        # Bytes below 64: so no scale is infinite or large, wherever in a block it is.
        data = rng.integers(0, 64, (rows, columns // elements * size), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
