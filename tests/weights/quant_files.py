"""Quantized Hugging Face folders of one small Llama, packed without Yoke's code: as the libraries do,
by shifting every i-th number into its place of an int32."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from base.errors import InputError
from weights.open import open_checkpoint

HEADS, KV_HEADS, HEAD_DIM, DIM, FFN, VOCAB = 6, 3, 32, 192, 384, 120
SHAPES = {
    "self_attn.q_proj": (DIM, DIM),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, DIM),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, DIM),
    "self_attn.o_proj": (DIM, DIM),
    "mlp.gate_proj": (FFN, DIM),
    "mlp.up_proj": (FFN, DIM),
    "mlp.down_proj": (DIM, FFN),
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": DIM,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LAYER = "model.layers.0."
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Kind:
    """A way of storing. `group` 0: a scale a row."""

    method: str
    bits: int
    group: int
    symmetric: bool
    more: tuple[tuple[str, Any], ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.more).get(key, default)


def declared(kind: Kind) -> dict[str, Any]:
    size = kind.group or -1
    if kind.method == "gptq":
        return {
            "quant_method": "gptq", "bits": kind.bits, "group_size": size, "sym": kind.symmetric,
            "desc_act": kind.get("desc_act", False),
            "checkpoint_format": kind.get("checkpoint_format", "gptq"),
        }  # fmt: skip
    if kind.method == "awq":
        return {
            "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": None,
        }  # fmt: skip
    weights = {
        "num_bits": kind.bits, "type": "int", "symmetric": kind.symmetric,
        "group_size": kind.group or None, "strategy": "group" if kind.group else "channel",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": kind.method, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


def pack(q: np.ndarray, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Numbers from 0 on, packed along `dim` into int32."""
    per = 32 // bits
    q = np.moveaxis(q.astype(np.uint32), dim, -1)
    packed = np.zeros((*q.shape[:-1], -(-q.shape[-1] // per)), np.uint32)
    for i in range(per):
        part = q[..., (order[i] if order else i) :: per]
        packed[..., : part.shape[-1]] |= part << np.uint32(bits * i)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, dim)).view(np.int32))


def module(kind: Kind, n: int, k: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """A random module: its tensors by the ends of their names, and its weight in float32."""
    groups, half = k // (kind.group or k), 1 << (kind.bits - 1)
    q = rng.integers(0, 2 * half, (n, k))
    zero = np.full((n, groups), half)
    if not kind.symmetric:
        zero = rng.integers(1, 2 * half, (n, groups))
    scale = (rng.random((n, groups)) * 0.004 + 0.002).astype(np.float16)
    index = np.arange(k) // (kind.group or k)
    if kind.get("desc_act"):
        index = rng.permutation(index)
    weight = (q - zero[:, index]).astype(np.float32) * scale[:, index].astype(np.float32)
    scales = torch.from_numpy(scale)
    if kind.method == "gptq":
        stored = zero if kind.get("checkpoint_format") == "gptq_v2" else zero - 1
        found = {
            "qweight": pack(q.T, kind.bits, 0),
            "qzeros": pack(stored.T, kind.bits, 1),
            "scales": scales.t().contiguous(),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
    elif kind.method == "awq":
        found = {
            "qweight": pack(q.T, 4, 1, _AWQ),
            "qzeros": pack(zero.T, 4, 1, _AWQ),
            "scales": scales.t().contiguous(),
        }
    elif kind.method == "pack-quantized":
        found = {
            "weight_packed": pack(q, kind.bits, 1),
            "weight_scale": scales.to(kind.get("scales", torch.float16)),
            "weight_shape": torch.tensor([n, k]),
        }
        if not kind.symmetric:
            found["weight_zero_point"] = pack(zero, kind.bits, 0)
    else:
        found = {"weight": torch.from_numpy((q - half).astype(np.int8)), "weight_scale": scales}
        if not kind.symmetric:
            found["weight_zero_point"] = torch.from_numpy((zero - half).astype(np.int8))
    return found, torch.from_numpy(weight)


def plain_tensors() -> dict[str, Tensor]:
    """The weights of a model that are not quantized."""
    return {
        "model.embed_tokens.weight": torch.randn(VOCAB, DIM),
        "lm_head.weight": torch.randn(VOCAB, DIM) * 0.1,
        "model.norm.weight": torch.ones(DIM),
        f"{LAYER}input_layernorm.weight": torch.ones(DIM),
        f"{LAYER}post_attention_layernorm.weight": torch.ones(DIM),
    }


def write(folder: Path, kind: Kind) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A folder with a model; what is stored, and the quantized weights in float32 by canonical name."""
    rng = np.random.default_rng(5)
    torch.manual_seed(5)
    stored = plain_tensors()
    weights = {}
    for name, (n, k) in SHAPES.items():
        parts, weights[f"{LAYER}{name}.weight"] = module(kind, n, k, rng)
        stored |= {f"{LAYER}{name}.{end}": tensor for end, tensor in parts.items()}
    save(folder, stored, declared(kind))
    return stored, weights


def save(folder: Path, stored: dict[str, Tensor], about: Any) -> None:
    save_file(stored, folder / "model.safetensors")
    config = CONFIG | {"quantization_config": about} if about is not None else CONFIG
    (folder / "config.json").write_text(json.dumps(config))


def check_disagreement(
    folder: Path,
    stored: dict[str, Tensor],
    about: dict[str, Any],
    lie: Callable[[dict[str, Tensor], dict[str, Any]], None],
    match: str,
) -> None:
    """A folder with this config and these tensors opens, and is refused after `lie` has changed one of
    them."""
    open_checkpoint(folder)
    lie(stored, about)
    save(folder, stored, about)
    with pytest.raises(InputError, match=match) as error:
        open_checkpoint(folder)
    assert "quantization_config" in str(error.value)
