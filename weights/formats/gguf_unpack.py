"""Unpack GGUF's blocks into codes and factors (weights.schemes): a function for each block format.

Only bits are rearranged and integers added, so no value is rounded. Minima that a format subtracts are
negated: here offsets are added. A function takes whole blocks, uint8 [count, bytes], writes the codes
of their numbers to `codes`, uint8 [count, numbers], and returns the factors as `Found`. Eight bytes are
shifted at a time (`put`), because a file has as many of them as memory can bring.

What is not here: the table of formats (weights.formats.gguf_blocks), and formats whose codes are
indexes of a codebook (weights.formats.gguf_grids).

Source: the structures `block_*` of ggml's `ggml-common.h`, and the order of numbers in the functions
`dequantize_row_*` of its `ggml-quants.c`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ONES = 0x0101010101010101  # the lowest bit of each byte of a word


class Found(NamedTuple):
    """The factors of blocks, each [count, groups or super-groups of a block], in the dtypes of
    weights.quant.Factors."""

    scale: Tensor
    offset: Tensor | None = None
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None


def words(section: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """A part of blocks, uint8 [count, bytes], copied as words [count, bytes / size of a word]."""
    # Always a copy: a part of a single block is contiguous, but not aligned.
    return section.clone(memory_format=torch.contiguous_format).view(dtype)


def halves(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start`, [count, 1]."""
    return words(blocks[:, start : start + 2], torch.float16)


def put(section: Tensor, run: int, bits: int, codes: Tensor, at: int = 0) -> None:
    """Write fields of `bits` bits to the bits of the codes from `at` on; for `at` = 0 the others become
    0. section: uint8 [count, bytes] in runs of `run` bytes. The lowest fields of a run's bytes are the
    first numbers, then come the next fields of the same bytes."""
    count, runs, fields = len(section), section.shape[1] // run, 8 // bits
    packed = words(section).view(count, runs, run // 8)
    wanted = codes.view(torch.int64).view(count, runs, fields, run // 8)
    mask = ((1 << bits) - 1) * ONES << at
    for i in range(fields):
        shift = bits * i - at
        moved = packed >> shift if shift > 0 else packed << -shift if shift < 0 else packed
        if at:
            wanted[:, :, i].bitwise_or_(moved & mask)
        else:
            torch.bitwise_and(moved, mask, out=wanted[:, :, i])


def nibbles(section: Tensor) -> Tensor:
    """Numbers of 4 bits, two per byte, the lower first: uint8 [count, bytes] -> [count, 2 bytes]."""
    return torch.stack((section & 15, section >> 4), dim=-1).flatten(1)


@cache
def bytes_of_bits(value: int) -> Tensor:
    """For each byte, a word with `value` in byte i if bit i is set: int64 [256]."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (bits * value).to(torch.uint8).view(torch.int64).flatten()


def take(table: Tensor, indexes: Tensor) -> Tensor:
    """The entries of a table, in the shape of `indexes`. (Five times as fast as `table[indexes]`.)"""
    return torch.index_select(table, 0, indexes.int().flatten()).view(indexes.shape)


def put_entries(table: Tensor, indexes: Tensor, codes: Tensor) -> None:
    """Write entries of a table of words to the codes, eight at a time."""
    wanted = codes.view(torch.int64).view(-1)
    torch.index_select(table, 0, indexes.int().flatten(), out=wanted)


def q4_0(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 2:], 16, 4, codes)
    return Found(halves(blocks, 0))


def q4_1(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 4:], 16, 4, codes)
    return Found(halves(blocks, 0), halves(blocks, 2))


def q5_0(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 6:], 16, 4, codes)
    _put_fifth_bits(blocks[:, 2:6], codes)
    return Found(halves(blocks, 0))


def q5_1(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 8:], 16, 4, codes)
    _put_fifth_bits(blocks[:, 4:8], codes)
    return Found(halves(blocks, 0), halves(blocks, 2))


def _put_fifth_bits(section: Tensor, codes: Tensor) -> None:
    """Bit i of the section, uint8 [count, 4], is the upper one of number i."""
    codes.view(torch.int64).bitwise_or_(take(bytes_of_bits(16), section))


def q8_0(blocks: Tensor, codes: Tensor) -> Found:
    codes.copy_(blocks[:, 2:])
    return Found(halves(blocks, 0))


def mxfp4(blocks: Tensor, codes: Tensor) -> Found:
    # ggml has twice the values of e2m1 and half the scale; their products are the same.
    put(blocks[:, 1:], 16, 4, codes)
    return Found(blocks[:, :1].clone())


def nvfp4(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 4:], 8, 4, codes)
    return Found(blocks[:, :4] & 0x7F)  # the scales have no sign: ggml ignores that bit


def q2_k(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 16:80], 32, 2, codes)
    both = blocks[:, :16]
    return Found(both & 15, both >> 4, halves(blocks, 80), -halves(blocks, 82))


def q3_k(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 32:96], 32, 2, codes)
    put(blocks[:, :32], 32, 1, codes, at=2)
    # 16 scales of 6 bits: bytes 0 to 7 have the lower 4 bits of scales 0 to 7, and above them those of
    # scales 8 to 15; byte 8 + i has the upper 2 bits of scales i, i + 4, i + 8 and i + 12.
    packed = words(blocks[:, 96:108], torch.int32)
    low, high = packed[:, :2], packed[:, 2:]
    scales = torch.cat((low & 0x0F0F0F0F, low >> 4 & 0x0F0F0F0F), dim=1)
    upper = torch.cat((high << 4, high << 2, high, high >> 2), dim=1)
    scales |= upper & 0x30303030
    return Found((scales.view(torch.uint8) - 32).view(torch.int8), super_scale=halves(blocks, 108))


def q4_k(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 16:], 32, 4, codes)
    return _scales_and_minima(blocks)


def q5_k(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 48:], 32, 4, codes)
    put(blocks[:, 16:48], 32, 1, codes, at=4)
    return _scales_and_minima(blocks)


def _scales_and_minima(blocks: Tensor) -> Found:
    """The factors of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits. Bytes 0 to 3 have the first four
    scales, bytes 4 to 7 the first four minima. Bytes 8 to 11 have the lower 4 bits of the other scales,
    and in their upper halves those of the other minima, whose upper 2 bits are above the first ones."""
    packed = words(blocks[:, 4:16], torch.int32)
    first, others = packed[:, :2], packed[:, 2:]
    low = torch.cat((others, others >> 4), dim=1) & 0x0F0F0F0F
    both = torch.stack((first & 0x3F3F3F3F, low | (first >> 2 & 0x30303030)), dim=2)
    factors = both.view(torch.uint8)
    return Found(factors[:, 0], factors[:, 1], halves(blocks, 0), -halves(blocks, 2))


def q6_k(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, :128], 64, 4, codes)
    put(blocks[:, 128:192], 32, 2, codes, at=4)
    return Found(blocks[:, 192:208].clone().view(torch.int8), super_scale=halves(blocks, 208))


def iq4_xs(blocks: Tensor, codes: Tensor) -> Found:
    put(blocks[:, 8:], 16, 4, codes)
    # 8 scales of 6 bits: the upper 2 bits of scale i are bits 2 i and 2 i + 1 of a number of 16 bits.
    high = words(blocks[:, 2:4], torch.int16).int()
    upper = torch.cat([high >> 2 * i & 3 for i in range(8)], dim=1).to(torch.uint8)
    scales = nibbles(blocks[:, 4:8]) | upper << 4
    return Found((scales - 32).view(torch.int8), super_scale=halves(blocks, 0))
