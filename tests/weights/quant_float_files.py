"""Hugging Face folders of one small Llama in floats of 8 and 4 bits, written without Yoke's code, with
their weights dequantized in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.weights.quant_files import DIM, LAYER, SHAPES, VOCAB, plain_tensors, save
from weights.schemes import MXFP4, MXFP8, NVFP4, Scheme, fp8_scheme

Made = tuple[dict[str, Tensor], Tensor]  # a module's tensors by the ends of their names; its weight
Make = Callable[[int, int], Made]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ALL_E2M1 = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=torch.float64)


def e4m3(*shape: int) -> Tensor:
    """Random numbers of 8 bits, none of them NaN."""
    codes = torch.randint(0, 254, shape, dtype=torch.uint8)
    return (codes + (codes >= 127).to(torch.uint8)).view(torch.float8_e4m3fn)


def scales_of(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.01 + 0.001


def powers_of(*shape: int) -> tuple[Tensor, Tensor]:
    """Random powers of two: as their exponents (E8M0), and as numbers."""
    codes = torch.randint(110, 126, shape, dtype=torch.uint8)
    return codes, torch.pow(2.0, codes.double() - 127)


def in_blocks(scales: Tensor, rows: int, columns: int, n: int, k: int) -> Tensor:
    """The scale of each number [n, k] of a weight in blocks of rows and columns."""
    row, column = torch.arange(n) // rows, torch.arange(k) // columns
    return scales.double()[row][:, column]


def fp8_blocks(n: int, k: int, name: str, form: str, size: tuple[int, int] = (128, 128)) -> Made:
    weight = e4m3(n, k)
    grid = (-(-n // size[0]), -(-k // size[1]))
    if form in ("e8m0", "u8"):
        stored, scales = powers_of(*grid)
        stored = stored.view(torch.float8_e8m0fnu) if form == "e8m0" else stored
    else:
        stored = scales_of(*grid).to(torch.bfloat16 if form == "bf16" else torch.float32)
        scales = stored
    values = weight.double() * in_blocks(scales, *size, n, k)
    return {"weight": weight, name: stored}, values


def fp8_whole(n: int, k: int, name: str, shape: tuple[int, ...]) -> Made:
    """One scale for the weight, or one for each row; and static scales of activations."""
    weight, stored = e4m3(n, k), scales_of(*shape)
    values = weight.double() * (stored.double().reshape(-1, 1) if stored.numel() > 1 else stored)
    return {"weight": weight, name: stored, "input_scale": torch.ones(())}, values


def fp4(n: int, k: int, packed: str, whole: str) -> Made:
    """NVFP4, or MXFP4 (`whole` is "")."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    values = ALL_E2M1[codes.int()]
    octets = codes[:, ::2] | codes[:, 1::2] << 4
    if not whole:
        stored, scales = powers_of(n, k // 32)
        return {packed: octets, "weight_scale": stored}, values * scales.repeat_interleave(32, 1)
    stored = e4m3(n, k // 16)
    one = torch.rand(1) + 0.5 if whole == "weight_scale_2" else torch.rand(1) * 1000 + 500
    factor = one.double() if whole == "weight_scale_2" else 1 / one.double()
    values *= stored.double().repeat_interleave(16, 1) * factor
    return {packed: octets, "weight_scale": stored, whole: one}, values


@dataclass(frozen=True)
class FloatKind:
    """A way of storing: its name, its quantization_config, how a module [n, k] is made, and the scheme
    that it has."""

    name: str
    about: dict[str, Any] = field(hash=False)
    make: Make
    scheme: Scheme


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True} | weights,
        "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
    }
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def _deepseek(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"],
    } | more  # fmt: skip


def _modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]} | more


def _blocks(name: str, form: str, rows: int = 128, columns: int = 128) -> Make:
    return lambda n, k: fp8_blocks(n, k, name, form, (rows, columns))


def _whole(name: str, shape: str) -> Make:
    """`shape` is that of the scales: "", "1", "n" or "n1"."""
    return lambda n, k: fp8_whole(n, k, name, tuple(n if size == "n" else 1 for size in shape))


def _fp4(packed: str, whole: str) -> Make:
    return lambda n, k: fp4(n, k, packed, whole)


G128, ROWS = fp8_scheme(128), fp8_scheme(0)
STATIC = _deepseek(activation_scheme="static", weight_block_size=None)
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
UE8M0 = _deepseek(scale_fmt="ue8m0")
SMALL = _deepseek(weight_block_size=[64, 32])
FLOAT, INV, SCALE = "float-quantized", "weight_scale_inv", "weight_scale"
NV = compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)
MX = compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)
MX8 = compressed("mxfp8-quantized", strategy="group", group_size=32)
G96 = compressed("naive-quantized", strategy="group", group_size=96)
BLOCK = compressed(FLOAT, strategy="block", block_structure=[128, 128])
KINDS = [
    FloatKind("deepseek-f32", _deepseek(), _blocks(INV, "f32"), G128),
    FloatKind("deepseek-bf16", _deepseek(), _blocks(INV, "bf16"), G128),
    FloatKind("ue8m0", UE8M0, _blocks(INV, "e8m0"), G128),
    FloatKind("ue8m0-u8", UE8M0, _blocks(INV, "u8"), G128),
    FloatKind("blocks-64-32-e8m0", SMALL, _blocks(INV, "e8m0", 64, 32), MXFP8),
    FloatKind("blocks-64-32", SMALL, _blocks(INV, "f32", 64, 32), fp8_scheme(32)),
    FloatKind("fp8-tensor", STATIC, _whole(SCALE, ""), ROWS),
    FloatKind("fp8-tensor-inv", STATIC, _whole(INV, ""), ROWS),
    FloatKind("fbgemm", FBGEMM, _whole(SCALE, "n1"), ROWS),
    FloatKind("ct-tensor", compressed(FLOAT, strategy="tensor"), _whole(SCALE, "1"), ROWS),
    FloatKind("ct-channel", compressed(FLOAT, strategy="channel"), _whole(SCALE, "n1"), ROWS),
    FloatKind("ct-group", G96, _blocks(SCALE, "bf16", 1, 96), fp8_scheme(96)),
    FloatKind("ct-block", BLOCK, _blocks(SCALE, "bf16"), G128),
    FloatKind("ct-mxfp8", MX8, _blocks(SCALE, "u8", 1, 32), MXFP8),
    FloatKind("modelopt-fp8", _modelopt("FP8"), _whole(SCALE, ""), ROWS),
    FloatKind("modelopt-rows", _modelopt("FP8_PER_CHANNEL_PER_TOKEN"), _whole(SCALE, "n"), ROWS),
    FloatKind("modelopt-nvfp4", _modelopt("NVFP4"), _fp4("weight", "weight_scale_2"), NVFP4),
    FloatKind("ct-nvfp4", NV, _fp4("weight_packed", "weight_global_scale"), NVFP4),
    FloatKind("ct-mxfp4", MX, _fp4("weight_packed", ""), MXFP4),
]
BY_NAME = {kind.name: kind for kind in KINDS}


def write(folder: Path, kind: FloatKind) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A folder with a model; what is stored, and the weights in float64 by canonical name."""
    torch.manual_seed(7)
    stored = plain_tensors()
    weights = {}
    for name, (n, k) in SHAPES.items():
        parts, weights[f"{LAYER}{name}.weight"] = kind.make(n, k)
        stored |= {f"{LAYER}{name}.{end}": tensor for end, tensor in parts.items()}
    save(folder, stored, kind.about)
    return stored, weights


def experts(count: int, rows: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """A stack of matrices as gpt-oss stores it, by the ends of the names, and in float64."""
    codes = torch.randint(0, 16, (count, rows, k), dtype=torch.uint8)
    powers, scales = powers_of(count, rows, k // 32)
    values = ALL_E2M1[codes.int()] * scales.repeat_interleave(32, -1)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).view(count, rows, k // 32, 16)
    bias = torch.randn(count, rows).bfloat16()
    return {"blocks": blocks, "scales": powers, "bias": bias}, values


def write_gpt_oss(folder: Path, count: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A folder with the experts of a layer; what is stored, and their tensors by canonical name."""
    torch.manual_seed(7)
    module = f"{LAYER}mlp.experts"
    stored = {"model.embed_tokens.weight": torch.randn(VOCAB, DIM)}
    wanted: dict[str, Tensor] = {}
    for stack, names, rows, k in (
        ("gate_up_proj", ("gate_proj", "up_proj"), 192, 96),
        ("down_proj", ("down_proj",), 96, 160),
    ):
        parts, values = experts(count, rows, k)
        stored |= {f"{module}.{stack}_{end}": tensor for end, tensor in parts.items()}
        for expert in range(count):
            for i, name in enumerate(names):
                own = slice(i, None, len(names))
                wanted[f"{module}.{expert}.{name}.weight"] = values[expert, own]
                wanted[f"{module}.{expert}.{name}.bias"] = parts["bias"][expert, own]
    about = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    save(folder, stored, about)
    return stored, wanted
