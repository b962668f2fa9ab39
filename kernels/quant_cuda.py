"""y = x W^T with quantized weights on a GPU, with torch's own operators.

4-bit weights in groups of 32 to 256 use torch's int4 matmul where the sizes fit. All others use a plain
matmul, with which the compiler fuses the rest: integers are converted to x's dtype as they are read,
and the scale of a row is applied after the sum. The slow reference is `QuantWeight.dequantize` and a
matmul. Written from torch's sources; it has never run on a GPU yet.

Source: `_convert_weight_to_int4pack_cuda` and `_weight_int4pack_mm_cuda` in torch's int4mm.cu, and
their use in gpt-fast's quantize.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quant_linear import Packed
from weights.quant import QuantWeight

_TILES = 8  # inner tiles of 16 columns in the packed layout
_GROUPS = (32, 64, 128, 256)


def pack_cuda(weight: QuantWeight) -> Packed:
    """Pack a weight that is in GPU memory."""
    n, k = weight.shape
    scale, offset = weight.scale, weight.offset
    fits = n % 8 == 0 and k % (16 * _TILES) == 0 and weight.group_size in _GROUPS
    if weight.bits == 4 and fits:
        # torch's integers are q - 8, and the even column's is in the upper half of a byte.
        swapped = (weight.data << 4) | (weight.data >> 4)
        data = torch.ops.aten._convert_weight_to_int4pack(swapped.contiguous(), _TILES)
        own = scale.float()
        zero = torch.zeros_like(own) if offset is None else offset.float() + 8 * own
        pairs = torch.stack((own, zero), dim=-1).transpose(0, 1).contiguous()
        return Packed(data, pairs.to(torch.bfloat16), None, 4, weight.group_size, n)
    data = weight.data.contiguous().view(torch.uint8)
    return Packed(data, scale.contiguous(), offset, weight.bits, weight.group_size, n)


def quant_linear_cuda(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """[..., k] x [n, k] -> [..., n] of x's dtype."""
    assert packed.scale is not None, "bfloat16 is packed on a CPU alone"
    if packed.data.dtype == torch.int32:
        flat = x.reshape(-1, x.shape[-1]).bfloat16()  # the int4 matmul takes no other dtype
        y = torch.ops.aten._weight_int4pack_mm(flat, packed.data, packed.group_size, packed.scale)
        y = y.to(x.dtype).view(*x.shape[:-1], packed.num_rows)
        return y if bias is None else y + bias
    data = packed.data.view(torch.int8) if packed.bits == 8 else packed.data
    if packed.bits == 8 and packed.scale.shape[1] == 1 and packed.offset is None:
        y = (x @ data.t().to(x.dtype)) * packed.scale[:, 0].to(x.dtype)
        return y if bias is None else y + bias
    weight = QuantWeight(data, packed.scale, packed.offset, packed.bits, packed.group_size)
    return F.linear(x, weight.dequantize(x.dtype), bias)
