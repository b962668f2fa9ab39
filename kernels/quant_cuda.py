"""y = x W^T with quantized weights on a GPU, with torch's own operators.

4-bit weights in groups of 32 to 256 use torch's int4 matmul where the sizes fit. All others use a plain
matmul, with which the compiler fuses the rest: integers are converted to x's dtype as they are read,
and the scale of a row is applied after the sum. The slow reference is `QuantWeight.dequantize` and a
matmul. Written from torch's sources; it has never run on a GPU yet.

Source: `_convert_weight_to_int4pack_cuda` and `_weight_int4pack_mm_cuda` in torch's int4mm.cu, and
their use in gpt-fast's quantize.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weights.quant import QuantWeight, integer_weight, pack_nibbles, unpack_nibbles

_TILES = 8  # inner tiles of 16 columns in the packed layout
_GROUPS = (32, 64, 128, 256)


class CudaPacked(NamedTuple):
    """A weight [n, k] for a GPU. data: int32 in the layout of torch's int4 matmul, int8 [n, k] or
    (4 bits) uint8 [n, k / 2]; scale, offset: [n, groups]; with int32 `scale` has both."""

    data: Tensor
    scale: Tensor
    offset: Tensor | None
    form: tuple[int, ...]

    @property
    def bits(self) -> int:
        return self.form[0]

    @property
    def group_size(self) -> int:
        return self.form[1]

    @property
    def num_rows(self) -> int:
        return self.form[2]


def pack_cuda(weight: QuantWeight) -> CudaPacked:
    """Pack a weight of integers of 8 or 4 bits that is in GPU memory."""
    n, k = weight.shape
    scale, offset = weight.scale, weight.offset
    assert weight.codes in ("i8", "i4", "u4") and weight.supers is None, weight.codes
    fits = n % 8 == 0 and k % (16 * _TILES) == 0 and weight.group_size in _GROUPS
    form = (weight.bits, weight.group_size, n)
    if weight.bits == 4 and fits and k % weight.group_size == 0 and not weight.groups.skip:
        # torch's integers are q - 8, and the even column's is in the upper half of a byte.
        swapped = (weight.data[:, ::2] << 4) | weight.data[:, 1::2]
        data = torch.ops.aten._convert_weight_to_int4pack(swapped.contiguous(), _TILES)
        own = scale.float()
        zero = torch.zeros_like(own) if offset is None else offset.float() + 8 * own
        pairs = torch.stack((own, zero), dim=-1).transpose(0, 1).contiguous()
        return CudaPacked(data, pairs.to(torch.bfloat16), None, form)
    data = weight.data.contiguous() if weight.bits == 8 else pack_nibbles(weight.data)
    if k % weight.group_size or weight.groups.skip:  # a part of a larger weight: smaller groups
        size = math.gcd(weight.group_size, weight.groups.skip, k)
        scale, offset = weight.groups.spread(k)
        scale, offset = scale[:, ::size], None if offset is None else offset[:, ::size]
        form = (weight.bits, size, n)
    return CudaPacked(data, scale.contiguous(), offset, form)


def quant_linear_cuda(x: Tensor, packed: CudaPacked, bias: Tensor | None = None) -> Tensor:
    """[..., k] x [n, k] -> [..., n] of x's dtype."""
    if packed.data.dtype == torch.int32:
        flat = x.reshape(-1, x.shape[-1]).bfloat16()  # the int4 matmul takes no other dtype
        y = torch.ops.aten._weight_int4pack_mm(flat, packed.data, packed.group_size, packed.scale)
        y = y.to(x.dtype).view(*x.shape[:-1], packed.num_rows)
        return y if bias is None else y + bias
    data = packed.data if packed.bits == 8 else unpack_nibbles(packed.data)
    if packed.bits == 8 and packed.scale.shape[1] == 1 and packed.offset is None:
        y = (x @ data.t().to(x.dtype)) * packed.scale[:, 0].to(x.dtype)
        return y if bias is None else y + bias
    weight = integer_weight(data, packed.scale, packed.offset, packed.bits, packed.group_size)
    return F.linear(x, weight.dequantize(x.dtype), bias)
