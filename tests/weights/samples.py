"""Small valid checkpoints of one random Llama, in every format, written without Yoke's code."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor

from weights.checkpoint import Checkpoint

HEADS, KV_HEADS, HEAD_DIM, DIM, FFN, VOCAB, LAYERS = 4, 2, 16, 64, 96, 112, 2

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
PARAMS = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": -1,
}
TO_META = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "layers",
}


@functools.cache
def llama() -> dict[str, Tensor]:
    """The tensors of a random model of `transformers`, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {key: value for key, value in CONFIG.items() if key != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**settings)).bfloat16()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def tiny() -> dict[str, Tensor]:
    """A few small tensors for tests that damage files: one layer's query, a norm, an embedding."""
    generator = torch.Generator().manual_seed(1)
    return {
        "model.embed_tokens.weight": torch.randn(6, 8, generator=generator),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(8, generator=generator).half(),
    }


def whole(checkpoint: Checkpoint, name: str) -> Tensor:
    entry = checkpoint.entries[name]
    return entry.read(tuple(slice(0, size) for size in entry.shape))


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def write_safetensors(folder: Path, tensors: dict[str, Tensor], config: object = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return folder


def write_bin(folder: Path, tensors: dict[str, Tensor], shards: int, config: object = CONFIG) -> Path:
    """`pytorch_model.bin`, or shards of it with an index."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = list(tensors)
    places = {
        name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(names)
    }
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in names if places[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})
    return folder


def interleave(weight: Tensor, heads: int) -> Tensor:
    """From halves to neighbors: what the publishers' own converters call `permute`."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def meta_name(name: str) -> str:
    for ours, theirs in TO_META.items():
        name = name.replace(ours, theirs)
    return name


def meta_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's names, and its order of query and key rows."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    result = {}
    for name, value in tensors.items():
        kind = name.split(".")[-2]
        result[meta_name(name)] = interleave(value, heads[kind]) if kind in heads else value
    return result


def write_meta(
    folder: Path, tensors: dict[str, Tensor], parts: int, embedding_dim: int = 1, **params: object
) -> Path:
    """`consolidated.NN.pth`, split as Meta's parallel layers are."""
    folder.mkdir(exist_ok=True)
    stored = meta_tensors(tensors)
    for part in range(parts):
        mine = {"rope.freqs": torch.ones(HEAD_DIM // 2)}
        for name, value in stored.items():
            if value.dim() == 1:
                mine[name] = value
                continue
            by_columns = name.split(".")[-2] in ("wo", "w2")
            dim = embedding_dim if "tok_embeddings" in name else int(by_columns)
            mine[name] = value.chunk(parts, dim)[part].clone()
        torch.save(mine, folder / f"consolidated.{part:02}.pth")
    write_json(folder / "params.json", PARAMS | params)
    return folder


def write_gpt_fast(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """`model.pth` with fused query, key and value."""
    folder.mkdir(exist_ok=True)
    stored = meta_tensors(tensors)
    for i in range(LAYERS):
        qkv = [stored.pop(f"layers.{i}.attention.w{letter}.weight") for letter in "qkv"]
        stored[f"layers.{i}.attention.wqkv.weight"] = torch.cat(qkv)
    torch.save(stored, folder / "model.pth")
    return folder


def write_gguf(
    path: Path,
    arrays: dict[str, np.ndarray],
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    name: str = "llama",
    expert_count: int | Sequence[int] | None = None,
) -> Path:
    """A file of these arrays; `kinds` gives the type of those that are stored in blocks."""
    writer = gguf_package.GGUFWriter(path, name)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    if isinstance(expert_count, int):
        writer.add_expert_count(expert_count)
    elif expert_count is not None:
        writer.add_array(f"{name}.expert_count", expert_count)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "\u00e9\u20ac", "d"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3, 4])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for key, value in arrays.items():
        writer.add_tensor(key, value, raw_dtype=(kinds or {}).get(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
