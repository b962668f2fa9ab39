"""The layout of compressed-tensors: how a Hugging Face folder stores quantized weights.

A weight NAME.weight [n, k] becomes, in 4 bits ("pack-quantized"),

    NAME.weight_packed       int32 [n, k / 8]: eight numbers 0..15 in each, the first in the lowest bits
    NAME.weight_scale        float16 [n, groups]
    NAME.weight_zero_point   int32 [ceil(n / 8), groups], only if asymmetric: eight rows in each
    NAME.weight_shape        int64 [2]: n, k

The weight is (q - zero) * scale; without zero points, zero is 8. In 8 bits it becomes ("int-quantized")

    NAME.weight              int8 [n, k]
    NAME.weight_scale        float32 [n, 1]

Source: the compressors `pack_quantized` and `int_quantized` of the compressed-tensors project, and its
`QuantizationConfig`. What is not here: its other formats, and reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weights.quant import QuantWeight, pack_nibbles
from weights.schemes import Scheme

Shapes = dict[str, tuple[str, tuple[int, ...]]]
_PER_INT = 8  # numbers of 4 bits in an int32


def stored_shapes(name: str, shape: tuple[int, ...], scheme: Scheme) -> Shapes:
    """The tensors that store a weight [n, k]: {name: (dtype in safetensors' spelling, shape)}."""
    n, k = shape
    if scheme.bits == 8:
        return {name: ("I8", (n, k)), f"{name}_scale": ("F32", (n, 1))}
    groups = k // scheme.group_size
    shapes: Shapes = {
        f"{name}_packed": ("I32", (n, k // _PER_INT)),
        f"{name}_scale": ("F16", (n, groups)),
        f"{name}_shape": ("I64", (2,)),
    }
    if not scheme.symmetric:
        shapes[f"{name}_zero_point"] = ("I32", (-(-n // _PER_INT), groups))
    return shapes


def stored_tensors(name: str, weight: QuantWeight) -> dict[str, Tensor]:
    """The stored tensors of a weight, with the dtypes and shapes of `stored_shapes`."""
    if weight.bits == 8:
        return {name: weight.data, f"{name}_scale": weight.scale}
    tensors = {
        # Two numbers per byte, the lower half first, are eight per little-endian int32.
        f"{name}_packed": pack_nibbles(weight.data).contiguous().view(torch.int32),
        f"{name}_scale": weight.scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }
    if weight.offset is not None:
        zero = (-weight.offset / weight.scale.float()).round().to(torch.int64)
        n, groups = zero.shape
        rows = torch.zeros(-(-n // _PER_INT) * _PER_INT, groups, dtype=torch.int64)
        rows[:n] = zero
        shifts = torch.arange(0, 32, 4).view(1, _PER_INT, 1)
        packed = (rows.view(-1, _PER_INT, groups) << shifts).sum(1)
        tensors[f"{name}_zero_point"] = packed.to(torch.int32)  # wraps: bit 31 becomes the sign
    return tensors


def quantization_config(
    scheme: Scheme, head: Scheme | None, plain: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json. `head`: the scheme of the lm_head, or None if it is not
    quantized; `plain`: names of other linear modules that are not quantized."""
    groups = [_group(scheme, "Linear")]
    if head is not None and head != scheme:
        groups.append(_group(head, "lm_head"))
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": groups[0]["format"] if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [*plain, *([] if head is not None else ["lm_head"])],
    }


def _group(scheme: Scheme, target: str) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
    }
    return {
        "targets": [target],
        "format": "int-quantized" if scheme.bits == 8 else "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
