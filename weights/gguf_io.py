"""GGUF files (the format of llama.cpp), through the `gguf` package.

The file is mapped, not read; quantised blocks are dequantised to float32 as a slice is read. Names
are translated to the canonical ones, and two things that llama.cpp's converter changes are undone:
dimensions are stored in reverse, and the rows of the query and key projections of the Llama family
are reordered within each head for interleaved rotary embeddings. Both commute with taking whole
heads, so a rank that reads its own heads gets what it would have cut from the full tensor.

Source: the GGUF specification, and `permute` in llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from weights.checkpoint import Checkpoint, Entry, Slices, check_slices
from weights.errors import InputError

ARCHITECTURES = ("llama",)

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of the Llama family. Raises InputError."""
    try:
        reader = GGUFReader(path)
        config = {name: field.contents() for name, field in reader.fields.items()}
    # The package has no exception of its own: a damaged header surfaces as any of these.
    except (
        ValueError,
        IndexError,
        KeyError,
        OSError,
        MemoryError,
        OverflowError,
        TypeError,
    ) as error:
        raise InputError(
            f"{path} cannot be read as GGUF ({type(error).__name__}: {error}); it may be truncated: "
            "copy it again"
        ) from error
    architecture = config.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{path} holds a model of architecture {architecture!r}; supported: "
            + ", ".join(ARCHITECTURES)
        )
    entries: dict[str, Entry] = {}
    for tensor in reader.tensors:
        name = canonical_name(tensor.name)
        if name is None:
            raise InputError(f"{path} holds a tensor {tensor.name!r} that Yoke does not know")
        entries[name] = _entry(name, tensor, _num_heads(name, config, architecture))
    return Checkpoint(path, "gguf", entries, config)


def canonical_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor of the Llama family, or None."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _BLOCK_NAMES:
        return None
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"


def _num_heads(name: str, config: dict[str, Any], architecture: str) -> int | None:
    """How many heads' rows are to be put back in order; None where the rows are as they were."""
    prefix = f"{architecture}.attention."
    if ".q_proj." in name:
        return int(config[prefix + "head_count"])
    if ".k_proj." in name:
        return int(config.get(prefix + "head_count_kv", config[prefix + "head_count"]))
    return None


def _entry(name: str, tensor: Any, num_heads: int | None) -> Entry:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind = tensor.tensor_type
    read = _dequantiser(name, tensor.data, kind, shape)
    if num_heads is None:
        return Entry(shape, kind.name, read)
    head_dim = shape[0] // num_heads

    def read_heads(slices: Slices) -> Tensor:
        rows = slices[0]
        assert rows.start % head_dim == 0 and rows.stop % head_dim == 0, (name, rows, head_dim)
        part = read(slices)
        # Stored as (head, half-width, 2); wanted as (head, 2, half-width).
        pairs = part.reshape(-1, head_dim // 2, 2, *part.shape[1:])
        return pairs.transpose(1, 2).reshape(part.shape)

    return Entry(shape, kind.name, read_heads)


def _dequantiser(
    name: str, data: np.ndarray[Any, Any], kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> Callable[[Slices], Tensor]:
    """How to read a part of a tensor whose rows are stored as blocks along the last dimension."""

    def read(slices: Slices) -> Tensor:
        check_slices(name, shape, slices)
        sizes = [part.stop - part.start for part in slices]
        if 0 in sizes:
            return torch.empty(sizes)  # the package does not take empty arrays
        if kind in _PLAIN:
            return torch.from_numpy(np.array(data[slices]))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        columns = slices[-1]
        first, last = columns.start // block, -(-columns.stop // block)
        stored = data[(*slices[:-1], slice(first * block_bytes, last * block_bytes))]
        values = dequantize(np.ascontiguousarray(stored), kind)
        inside = slice(columns.start - first * block, columns.stop - first * block)
        return torch.from_numpy(np.ascontiguousarray(values[..., inside]))

    return read
