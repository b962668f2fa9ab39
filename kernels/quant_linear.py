"""y = x W^T with packed weights, quantized or bfloat16.

What: the packed layout (`pack`, `unpack`; csrc/quant.h shows it), the linear for any number of rows,
and the slow reference in torch. With few rows the linear is memory-bound: each weight is read once. So
it multiplies the integers as they are read, and scales only the sums of 32 of them.

What is not here: how weights are quantized, and their unpacked form (weights/quant.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import InputError
from kernels.load import has_kernels
from weights.quant import QuantWeight

STEP = 32  # columns that are stored together; k and the group size are multiples of it
TILE = 16  # rows that are stored together; a panel is two tiles


class Packed(NamedTuple):
    """A weight [n, k] in the operator's packed layout. n is `num_rows`; rows that pad the last panel of
    32 have scales of zero.

    data: uint8 [panels, k / 32, 2, 512 (8 bits) or 256 (4 bits)]. scale, offset: float16 or float32
    [panels, k / group_size, 2, 16]. With 16 bits the numbers are bfloat16: 1024 bytes instead of 512,
    and no scales (see kernels.packed).
    """

    data: Tensor
    scale: Tensor | None
    offset: Tensor | None
    bits: int
    group_size: int
    num_rows: int


def pack(weight: QuantWeight) -> Packed:
    """Pack a quantized weight. Raises InputError if k or the group size is not a multiple of 32."""
    n, k = weight.shape
    if k % STEP or weight.group_size % STEP:
        raise InputError(
            f"a quantized weight of {k} columns in groups of {weight.group_size} cannot be packed: "
            f"both must be multiples of {STEP}; use another number of ranks, or do not quantize it"
        )
    q = _padded(weight.integers().view(torch.uint8))
    # [panel, tile, row, step, pair, 2] -> [panel, step, tile, pair, row, 2]
    pairs = q.view(-1, 2, TILE, k // STEP, STEP // 2, 2).permute(0, 3, 1, 4, 2, 5)
    if weight.bits == 4:
        # A word is four pairs of a row: the first number of each pair in its lower half, the second in
        # its upper half.
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
    """The inverse of `pack`."""
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
    """The bfloat16 weight [n, k] of a packed 16-bit one: the inverse of `kernels.packed.pack_bf16`."""
    panels, steps = packed.data.shape[:2]
    pairs = packed.data.view(torch.bfloat16).view(panels, steps, 2, STEP // 2, TILE, 2)
    rows = pairs.permute(0, 2, 4, 1, 3, 5).reshape(panels * 2 * TILE, steps * STEP)
    return rows[: packed.num_rows, :k]


def quant_linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, round_x: bool = False
) -> Tensor:
    """[..., k] x [n, k] -> [..., n] of x's dtype. With bfloat16 on a CPU, integers are multiplied, sums
    are scaled in float32 and rounded once; in all other cases the reference runs.

    The method depends on the processor, the format and the number of rows of x. Few rows times int4
    may use integer arithmetic: each 32 numbers of x are quantized to 16 bits of their largest, and the
    sums of a step are exact. From 17 rows on, matrix units (AMX) multiply weights that were scaled and
    rounded to bfloat16, or the integers where each row has a single scale. Plain bfloat16 weights use
    them from 5 rows on. `round_x`: if there are also matrix units for int8, the weights have 8 bits and
    one scale per row, and x has 33 rows or more, each row of x is rounded to 255 steps around zero, and
    the sums are exact.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_kernels():
        return torch.ops.yoke_kernels.quant_linear(x, *packed, bias, round_x)
    return quant_linear_reference(x, packed, bias)


def quant_linear_reference(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """As `quant_linear`, slowly, on any device: the weight and the matmul are in float32 (float64 if x
    is), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if packed.scale is None:
        weight = unpack_bf16(packed, x.shape[-1]).to(wide)
    else:
        weight = unpack(packed).dequantize(wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def _padded(x: Tensor) -> Tensor:
    """Pad with zeros to whole panels of rows."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % (2 * TILE)))


def _pack_groups(scale: Tensor) -> Tensor:
    """[n, groups] -> [panels, groups, 2, 16]."""
    groups = scale.shape[1]
    return _padded(scale).view(-1, 2, TILE, groups).permute(0, 3, 1, 2).contiguous()


def _unpack_groups(scale: Tensor, num_rows: int) -> Tensor:
    return scale.permute(0, 2, 3, 1).flatten(0, 2)[:num_rows].contiguous()
