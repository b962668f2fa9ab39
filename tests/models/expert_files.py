"""Quantized files of a small mixture of experts: folders as the libraries write them, and GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from models.config import ModelConfig, expected_shapes
from models.quant_rules import is_linear
from tests.weights.quant_files import Kind, declared, module

DIM, WIDTH, COUNT = 96, 192, 4
# A layer with experts, and one without.
CONFIG = ModelConfig(
    DIM, 2, 6, 3, 32, 96, 120, 128, num_experts=COUNT, experts_per_token=2, expert_dim=WIDTH,
    dense_layers=(1,),
)  # fmt: skip
MIXTRAL = replace(CONFIG, num_layers=1, dense_layers=())
KEYS = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": DIM, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32, "intermediate_size": WIDTH,
    "vocab_size": 120, "max_position_embeddings": 128, "num_local_experts": COUNT,
    "num_experts_per_tok": 2,
}  # fmt: skip
QWEN = KEYS | {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": COUNT, "moe_intermediate_size": WIDTH,
    "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
MIXTRALS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def in_mixtral(name: str) -> str:
    """A canonical name in Mixtral's own terms."""
    head, found, rest = name.partition(".mlp.experts.")
    if not found:
        return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    index, part = rest.split(".")[:2]
    return f"{head}.block_sparse_moe.experts.{index}.{MIXTRALS[part]}.weight"


def write_folder(folder: Path, kind: Kind, mixtral: bool = True) -> Path:
    """A mixture of experts whose linear layers are quantized, in the names of its family."""
    random, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    config = replace(MIXTRAL, qk_norm=not mixtral)
    stored: dict[str, torch.Tensor] = {}
    for name, shape in expected_shapes(config).items():
        called = in_mixtral(name) if mixtral else name
        if is_linear(name):
            n, k = shape
            parts, _ = module(kind, n, k, random)
            base = called.removesuffix(".weight")
            stored |= {f"{base}.{end}": tensor for end, tensor in parts.items()}
        else:
            scale = 1.0 if "norm" in name else 0.1
            stored[called] = torch.randn(shape, generator=generator) * scale
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    keys = (KEYS if mixtral else QWEN) | {"quantization_config": declared(kind)}
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def write_gguf(path: Path, form_of: Callable[[str], gguf.GGMLQuantizationType]) -> Path:
    """The same as llama.cpp has it: the experts of a layer are one tensor."""
    random = np.random.default_rng(4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(6)
    writer.add_head_count_kv(3)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_context_length(128)
    writer.add_vocab_size(120)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(COUNT)
    writer.add_expert_used_count(2)
    shapes = {
        "token_embd": (120, DIM), "output": (120, DIM), "output_norm": (DIM,),
        "blk.0.attn_norm": (DIM,), "blk.0.ffn_norm": (DIM,), "blk.0.ffn_gate_inp": (COUNT, DIM),
        "blk.0.attn_q": (192, DIM), "blk.0.attn_k": (96, DIM), "blk.0.attn_v": (96, DIM),
        "blk.0.attn_output": (DIM, 192), "blk.0.ffn_gate_exps": (COUNT, WIDTH, DIM),
        "blk.0.ffn_up_exps": (COUNT, WIDTH, DIM), "blk.0.ffn_down_exps": (COUNT, DIM, WIDTH),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32) * (1 if len(shape) == 1 else 0.1)
        plain = len(shape) == 1 or name in ("token_embd", "output", "blk.0.ffn_gate_inp")
        form = gguf.GGMLQuantizationType.F32 if plain else form_of(name)
        stored = gguf.quants.quantize(values, form)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
