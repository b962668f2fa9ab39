"""The bytes of GGUF's blocks: the inverse of reading them.

A block holds 32 numbers, or 256 in K-quants (n is the number within the block):

    Q8_0  scale f16, 32 signed bytes
    Q4_0  scale f16, 16 bytes: number n in the lower half of byte n, n + 16 in its upper half
    Q5_0  scale f16, 4 bytes: the fifth bit of number n is bit n; then as Q4_0
    Q5_1  scale and offset f16, then as Q5_0;   Q4_1  scale and offset f16, then as Q4_0
    Q4_K  d and m f16, 12 bytes of 6-bit scales and minimums, 128 bytes: 64 numbers in each 32 bytes,
          the first 32 in the lower halves
    Q5_K  d and m, the 12 bytes; 32 bytes: the fifth bit of number n is bit n / 32 of byte n % 32; then
          as Q4_K
    Q6_K  128 bytes: of each 128 numbers, n and n + 64 share a byte; 64 bytes: the upper two bits, four
          numbers 32 apart in a byte; 16 signed scales; d f16

Source: the block structures in ggml's `ggml-common.h`. What is not here: choosing the numbers
(quantize.gguf_search), and reading (weights.formats.gguf_blocks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from weights.quant import QuantWeight

BLOCK_BYTES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip


def to_blocks(form: str, weight: QuantWeight) -> Tensor:
    """The stored bytes of a weight [n, k] in one of the forms above: uint8 [n, bytes]."""
    block, size = BLOCK_BYTES[form]
    n, k = weight.shape
    count = n * k // block
    q = weight.data.reshape(count, block)
    parts = _k_quant(form, weight, q) if block == 256 else _small(form, weight, q)
    joined = torch.cat([each.reshape(count, -1) for each in parts], 1)
    assert joined.shape == (count, size), (form, joined.shape)
    return joined.view(n, k // block * size)


def _small(form: str, weight: QuantWeight, q: Tensor) -> list[Tensor]:
    parts = [_bytes(weight.groups.scale)]
    if weight.groups.offset is not None:
        parts.append(_bytes(weight.groups.offset))
    if form == "Q8_0":
        return [*parts, q.view(torch.uint8)]
    if form in ("Q5_0", "Q5_1"):
        parts.append(_bits((q >> 4).view(len(q), 4, 8)))
    low = q & 15
    return [*parts, low[:, :16] | (low[:, 16:] << 4)]


def _k_quant(form: str, weight: QuantWeight, q: Tensor) -> list[Tensor]:
    assert weight.supers is not None
    d = _bytes(weight.supers.scale)
    if form == "Q6_K":
        low = (q & 15).view(-1, 2, 2, 64)
        high = (q >> 4).view(-1, 2, 4, 32)
        upper = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
        return [low[:, :, 0] | (low[:, :, 1] << 4), upper, weight.groups.scale.view(torch.uint8), d]
    assert weight.supers.offset is not None and weight.groups.offset is not None
    six = _six_bits(weight.groups.scale.reshape(-1, 8), weight.groups.offset.reshape(-1, 8))
    parts = [d, _bytes(-weight.supers.offset), six]
    if form == "Q5_K":
        parts.append(_bits((q >> 4).view(-1, 8, 32).transpose(1, 2)))
    low = (q & 15).view(-1, 4, 2, 32)
    return [*parts, low[:, :, 0] | (low[:, :, 1] << 4)]


def _six_bits(scale: Tensor, low: Tensor) -> Tensor:
    """Eight scales and eight minimums of 6 bits, uint8 [S, 8] each, in 12 bytes: the first four of each
    in the lower bits of bytes 0-3 and 4-7; the others' lower halves in bytes 8-11, and their upper two
    bits above the first four."""
    first = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    second = low[:, :4] | ((low[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (scale[:, 4:] & 15) | ((low[:, 4:] & 15) << 4)], 1)


def _bits(bits: Tensor) -> Tensor:
    """Bits uint8 [..., 8] as bytes, the first in the lowest place."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits << places).sum(-1).to(torch.uint8)


def _bytes(values: Tensor) -> Tensor:
    """The bytes of float16 numbers: uint8 [numbers, 2]."""
    return values.contiguous().view(torch.uint8).reshape(-1, 2)
