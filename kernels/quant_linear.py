"""y = x W^T with quantized weights, or bfloat16 ones, laid out for the processor.

What: the layout (`pack`, `unpack`; csrc/quant.h draws it), the product for any number of rows, and the
slow reference in torch. A few rows read each weight once, so the time shall be that of reading: whole
numbers are multiplied as they come, and the sums of 32 scaled.

What is not here: how weights are quantized, and their logical form (weights/quant.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import InputError
from kernels.load import has_kernels
from weights.quant import QuantWeight

STEP = 32  # numbers of k that lie together, and what k and groups are multiples of
TILE = 16  # rows of w that lie together; a panel is two tiles


class Packed(NamedTuple):
    """A weight [n, k] as the operator reads it. n is `num_rows`; panels of 32 rows are filled up with
    scales of zero.

    data: uint8 [panels, k / 32, 2, 512 (8 bits) or 256 (4 bits)]. scale, offset: float16 or float32
    [panels, k / group_size, 2, 16]. In 16 bits the numbers are bfloat16, 1024 bytes in place of 512,
    without scales (see kernels.packed).
    """

    data: Tensor
    scale: Tensor | None
    offset: Tensor | None
    bits: int
    group_size: int
    num_rows: int


def pack(weight: QuantWeight) -> Packed:
    """Lay a weight out. Raises InputError where k or the groups are not multiples of 32."""
    n, k = weight.shape
    if k % STEP or weight.group_size % STEP:
        raise InputError(
            f"a quantized weight of {k} columns in groups of {weight.group_size} cannot be laid out: "
            f"both must be multiples of {STEP}; use another number of ranks, or do not quantize it"
        )
    q = _padded(weight.integers().view(torch.uint8))
    # [panel, tile, row, step, pair, 2] -> [panel, step, tile, pair, row, 2]
    pairs = q.view(-1, 2, TILE, k // STEP, STEP // 2, 2).permute(0, 3, 1, 4, 2, 5)
    if weight.bits == 4:
        # Four pairs of a row are a word: the first of each in its lower half, the second in its upper.
        words = pairs.unflatten(3, (4, 4)).permute(0, 1, 2, 3, 5, 6, 4)  # [.., 4, row, 2, 4 pairs]
        pairs = words[..., ::2] | (words[..., 1::2] << 4)
    data = pairs.flatten(3).contiguous()
    scale, offset = weight.scale, weight.offset
    if offset is not None and offset.dtype != scale.dtype:
        scale, offset = scale.float(), offset.float()
    return Packed(
        data,
        _pack_groups(scale),
        None if offset is None else _pack_groups(offset),
        weight.bits,
        weight.group_size,
        n,
    )


def unpack(packed: Packed) -> QuantWeight:
    """The quantized weight that was packed."""
    assert packed.scale is not None, "bfloat16 is not quantized"
    panels, steps = packed.data.shape[:2]
    if packed.bits == 4:
        nibbles = torch.stack((packed.data & 15, packed.data >> 4), dim=-1)
        words = nibbles.view(panels, steps, 2, 4, TILE, 2, 4)
        pairs = words.permute(0, 1, 2, 3, 6, 4, 5).flatten(3, 4)
    else:
        pairs = packed.data.view(panels, steps, 2, STEP // 2, TILE, 2)
    q = pairs.permute(0, 2, 4, 1, 3, 5).reshape(panels * 2 * TILE, steps * STEP)[: packed.num_rows]
    data = q.view(torch.int8) if packed.bits == 8 else q[:, ::2] | (q[:, 1::2] << 4)
    offset = None if packed.offset is None else _unpack_groups(packed.offset, packed.num_rows)
    scale = _unpack_groups(packed.scale, packed.num_rows)
    return QuantWeight(data, scale, offset, packed.bits, packed.group_size)


def unpack_bf16(packed: Packed, k: int) -> Tensor:
    """The weight [n, k] of 16 bits that was packed."""
    panels, steps = packed.data.shape[:2]
    pairs = packed.data.view(torch.bfloat16).view(panels, steps, 2, STEP // 2, TILE, 2)
    rows = pairs.permute(0, 2, 4, 1, 3, 5).reshape(panels * 2 * TILE, steps * STEP)
    return rows[: packed.num_rows, :k]


def quant_linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, round_x: bool = False
) -> Tensor:
    """[..., k] x [n, k] -> [..., n] of x's dtype. With bfloat16 on a CPU whole numbers are multiplied,
    and sums scaled in float32, and rounded once; else it is the reference.

    How depends on the processor, the format and the rows of x. A few rows times int4 may be products
    of bytes: x is taken to 16 bits of the largest of each 32 numbers, and sums of a step are exact.
    From 17 rows on, matrix units multiply weights that were scaled and rounded to bfloat16 (whole
    numbers, where a row has one scale); plain bfloat16 they multiply from 5 rows on. `round_x`: where
    there are also such units for int8, weights have 8 bits and a scale a row, and x has 33 rows or
    more, each row of x is rounded to 255 steps around zero, and the sums are exact.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_kernels():
        return torch.ops.yoke_kernels.quant_linear(x, *packed, bias, round_x)
    return quant_linear_reference(x, packed, bias)


def quant_linear_reference(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same, slowly, on any device: the weight and the product in float32 (float64 where x is),
    rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if packed.scale is None:
        weight = unpack_bf16(packed, x.shape[-1]).to(wide)
    else:
        weight = unpack(packed).dequantize(wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def _padded(x: Tensor) -> Tensor:
    """Whole panels of rows, with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % (2 * TILE)))


def _pack_groups(scale: Tensor) -> Tensor:
    """[n, groups] -> [panels, groups, 2, 16]."""
    groups = scale.shape[1]
    return _padded(scale).view(-1, 2, TILE, groups).permute(0, 3, 1, 2).contiguous()


def _unpack_groups(scale: Tensor, num_rows: int) -> Tensor:
    return scale.permute(0, 2, 3, 1).flatten(0, 2)[:num_rows].contiguous()
