"""y = x W^T with quantised weights: a plain stand-in, which dequantises for every product.

`Packed` is what a layer holds; here it is the logical form of weights.quant as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weights.quant import QuantWeight


class Packed(NamedTuple):
    """Weights [num_rows, k] as products take them."""

    data: Tensor
    scale: Tensor
    offset: Tensor | None
    bits: int
    group_size: int
    num_rows: int


def pack(weight: QuantWeight) -> Packed:
    """Lay out a weight whose k is a multiple of 32 and of its groups."""
    n, k = weight.shape
    assert k % 32 == 0 and k % weight.group_size == 0, (k, weight.group_size)
    data = weight.data.contiguous().view(torch.uint8)
    offset = None if weight.offset is None else weight.offset.contiguous()
    return Packed(data, weight.scale.contiguous(), offset, weight.bits, weight.group_size, n)


def quant_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """[..., k] x [n, k] -> [..., n]."""
    data = packed.data.view(torch.int8) if packed.bits == 8 else packed.data
    weight = QuantWeight(data, packed.scale, packed.offset, packed.bits, packed.group_size)
    return F.linear(x, weight.dequantise(x.dtype), bias)
