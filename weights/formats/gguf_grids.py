"""Unpack GGUF's blocks whose numbers are chosen from a codebook, eight or four at a time, with signs.

The values of a codebook are small integers. So each number becomes one code, with factors that keep the
stored value exactly: a super-group's float16 times a power of two is a float32, and a group's scale is
an odd integer, 2 s + 1.

| formats | values | kept as |
|---|---|---|
| IQ2_XXS, IQ2_XS, IQ2_S | 8, 25, 43 with sign | int8 |
| IQ3_XXS | 4, 12, .. 52, 62 with sign | half of it, 6 bits |
| IQ3_S | 1, 3, .. 15 with sign | v = 2 c - 15, c of 4 bits |
| IQ1_S | -1, 0, 1, plus 1/8 or minus 1/8 by groups | v + 1 in 2 bits; the rest is the offset |
| IQ1_M | the same by 8 numbers | 8 v = 2 c - 9, c of 4 bits |

The codebooks are those of the `gguf` package. What is not here: the table of formats
(weights.formats.gguf_blocks).

Source: the structures `block_iq*` of ggml's `ggml-common.h`, and the functions `dequantize_row_iq*` of
its `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from weights.formats.gguf_unpack import (
    ONES,
    Found,
    bytes_of_bits,
    halves,
    nibbles,
    put_entries,
    take,
    words,
)


@cache
def _grid(form: str, code_of: Callable[[Tensor], Tensor]) -> Tensor:
    """A codebook with the code of each value: words int64 [entries] of eight, or int32 of four."""
    from gguf import quants  # imported only for these formats

    owner = getattr(quants, form)
    owner.init_grid()
    grid = torch.from_numpy(owner.grid).reshape(owner.grid_shape)
    word = {8: torch.int64, 4: torch.int32}[grid.shape[1]]
    return code_of(grid).to(torch.uint8).view(word).flatten()


@cache
def _flips() -> Tensor:
    """By an index of 7 bits, a word with 255 in the bytes that are negative: int64 [128]. The eighth
    sign makes the number of signs even."""
    from gguf.quants import IQ2_XXS

    signs = torch.frombuffer(bytearray(IQ2_XXS.ksigns), dtype=torch.uint8)
    return take(bytes_of_bits(255), signs)


@cache
def _signed(form: str) -> Tensor:
    """A codebook of int8 with each combination of signs: int64 [128 * entries], those of the same signs
    beside each other."""
    return _negate(_grid(form, _same).unsqueeze(0), _flips().unsqueeze(1)).flatten()


def _same(value: Tensor) -> Tensor:
    return value


def _half_above_32(value: Tensor) -> Tensor:
    return value / 2 + 32


def _half_of_15_more(value: Tensor) -> Tensor:
    return (value + 15) / 2


def _one_more(value: Tensor) -> Tensor:
    return value + 1


def _four_times_one_more(value: Tensor) -> Tensor:
    return 4 * (value + 1)


def _negate(values: Tensor, flips: Tensor) -> Tensor:
    """Negate those bytes of words int64 that are 255 in `flips`, and 0 elsewhere, modulo 256. No byte
    of the values may be 0 (it would carry)."""
    return (values ^ flips) + (flips & ONES)


def _write(codes: Tensor, found: Tensor) -> None:
    codes.view(torch.int64).copy_(found)


def _fours(indexes: Tensor) -> Tensor:
    """Sign indexes of 7 bits, four in each int32: [count, n] -> [count, 4 n]."""
    return torch.stack([indexes >> 7 * i & 127 for i in range(4)], dim=-1).flatten(1)


def _above(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Indexes of more than 8 bits: those of `low`, uint8 [count, n], with the bits above them from the
    fields of `bits` bits in `high`, [count, m], the lowest fields first."""
    wide = high.int()
    fields = low.shape[1] // high.shape[1]
    upper = torch.stack([wide >> bits * i & (1 << bits) - 1 for i in range(fields)], dim=-1)
    return low.int() | upper.flatten(1) << 8


def _odd(scales: Tensor) -> Tensor:
    """2 s + 1, uint8."""
    return (2 * scales + 1).to(torch.uint8)


def iq2_xxs(blocks: Tensor, codes: Tensor) -> Found:
    both = words(blocks[:, 2:], torch.int32).unflatten(1, (8, 2))
    first, last = both.unbind(-1)  # four indexes; signs and a scale
    indexes = first.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    put_entries(_signed("IQ2_XXS"), indexes.int() | _fours(last) << 8, codes)
    return Found(_odd(last >> 28 & 15), super_scale=halves(blocks, 0).float() / 8)


def iq2_xs(blocks: Tensor, codes: Tensor) -> Found:
    packed = words(blocks[:, 2:66], torch.int16).int() & 0xFFFF  # 9 bits of an index, 7 of signs
    put_entries(_signed("IQ2_XS"), packed, codes)
    return Found(_odd(nibbles(blocks[:, 66:])), super_scale=halves(blocks, 0).float() / 8)


def iq2_s(blocks: Tensor, codes: Tensor) -> Found:
    indexes = _above(blocks[:, 2:34], blocks[:, 66:74], 2)
    flips = take(bytes_of_bits(255), blocks[:, 34:66])
    _write(codes, _negate(take(_grid("IQ2_S", _same), indexes), flips))
    return Found(_odd(nibbles(blocks[:, 74:])), super_scale=halves(blocks, 0).float() / 8)


def iq3_xxs(blocks: Tensor, codes: Tensor) -> Found:
    last = words(blocks[:, 66:], torch.int32)  # signs and a scale
    positive = take(_grid("IQ3_XXS", _half_above_32), blocks[:, 2:66]).view(torch.int64)
    # The code of -v is 64 - c.
    _write(codes, _negate(positive, take(_flips(), _fours(last))) & 63 * ONES)
    return Found(_odd(last >> 28 & 15), super_scale=halves(blocks, 0).float() / 2)


def iq3_s(blocks: Tensor, codes: Tensor) -> Found:
    ninth = take(bytes_of_bits(1), blocks[:, 66:74]).view(torch.uint8)
    indexes = blocks[:, 2:66].int() | ninth.int() << 8
    positive = take(_grid("IQ3_S", _half_of_15_more), indexes).view(torch.int64)
    _write(codes, positive ^ take(bytes_of_bits(15), blocks[:, 74:106]))  # the code of -v is 15 - c
    scales, whole = _odd(nibbles(blocks[:, 106:])), halves(blocks, 0).float()
    return Found(scales, scales, 2 * whole, -15 * whole)


def iq1_s(blocks: Tensor, codes: Tensor) -> Found:
    upper = words(blocks[:, 34:], torch.int16).int()
    put_entries(_grid("IQ1_S", _one_more), _above(blocks[:, 2:34], upper, 3), codes)
    scales, whole = _odd(upper >> 12 & 7), halves(blocks, 0).float()
    # v + 1/8 = c - 7/8, and v - 1/8 = c - 9/8.
    eighths = torch.where(upper < 0, 9, 7)
    return Found(scales, (scales * eighths).to(torch.uint8), whole, -whole / 8)


@cache
def _grid_of_iq1_m() -> Tensor:
    """The codebook with 1/8 added, and with 1/8 subtracted."""
    less = _grid("IQ1_M", _four_times_one_more)
    return torch.cat((less + ONES, less))


def iq1_m(blocks: Tensor, codes: Tensor) -> Found:
    upper = nibbles(blocks[:, 32:48])  # 3 bits of an index, and whether 1/8 is subtracted
    put_entries(_grid_of_iq1_m(), blocks[:, :32].int() | upper.int() << 8, codes)
    packed = words(blocks[:, 48:], torch.int16).int()  # four scales, and four bits of a float16
    quarters = [packed[:, i : i + 1] >> 12 & 15 for i in range(4)]
    bits = quarters[0] | quarters[1] << 4 | quarters[2] << 8 | quarters[3] << 12
    whole = bits.to(torch.int16).view(torch.float16).float()
    scales = _odd(torch.stack([packed >> 3 * i & 7 for i in range(4)], dim=-1).flatten(1))
    return Found(scales, scales, whole / 4, whole * -9 / 8)
