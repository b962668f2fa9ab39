"""Convert GGUF's blocks of 32 numbers to weights.quant: only bits are rearranged, no value changes.

Q8_0 is a float16 scale and 32 signed bytes. Q4_0 is a scale and 16 bytes, number i in the lower half
of byte i and number i + 16 in its upper half. Q4_1 is the same, with the block's minimum, float16,
after the scale. What is not here: other block formats (K-quants), which the gguf package dequantizes.

Source: `block_q4_0`, `block_q4_1` and `block_q8_0` of ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from weights.checkpoint import ReadQuant, Slices
from weights.quant import QuantWeight, integer_weight
from weights.schemes import GGUF_SCHEMES as SCHEMES

SIZE = 32  # numbers in a block
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def from_blocks(raw: Tensor, form: str) -> QuantWeight:
    """The quantized weight of stored whole blocks, uint8 [n, bytes]; `form` is one of SCHEMES."""
    n, count = raw.shape[0], raw.shape[1] // _BYTES[form]
    blocks = raw.view(n, count, _BYTES[form])
    scale = blocks[..., :2].contiguous().view(torch.float16).view(n, count)
    if form == "Q8_0":
        data = blocks[..., 2:].contiguous().view(torch.int8).view(n, count * SIZE)
        return integer_weight(data, scale, None, 8, SIZE)
    offset, first = None, 2
    if form == "Q4_1":
        offset, first = blocks[..., 2:4].contiguous().view(torch.float16).view(n, count), 4
    halves = blocks[..., first:]
    q = torch.cat((halves & 15, halves >> 4), dim=-1).view(n, count * SIZE)
    return integer_weight(q, scale, offset, 4, SIZE)


def reader_of_blocks(
    form: str, shape: tuple[int, ...], read_raw: Callable[[Slices], Tensor]
) -> ReadQuant | None:
    """A function that reads a matrix of blocks as a quantized weight; None if it is not a matrix or
    the kernels do not support its block format."""
    if form not in SCHEMES or len(shape) != 2:
        return None
    return partial(_read, form, read_raw, ())


def reader_of_stacked_blocks(
    form: str, shape: tuple[int, ...], read_raw: Callable[[Slices], Tensor]
) -> Callable[[int, slice, slice], QuantWeight] | None:
    """As `reader_of_blocks`, for one matrix of a stack, by its index."""
    if form not in SCHEMES or len(shape) != 3:
        return None

    def quant_of(index: int, rows: slice, columns: slice) -> QuantWeight:
        return _read(form, read_raw, (slice(index, index + 1),), rows, columns)

    return quant_of


def _read(
    form: str, read_raw: Callable[[Slices], Tensor], where: Slices, rows: slice, columns: slice
) -> QuantWeight:
    first, last = columns.start // SIZE * SIZE, -(-columns.stop // SIZE) * SIZE
    raw = read_raw((*where, rows, slice(first, last)))
    whole = from_blocks(raw.flatten(0, -2), form)
    return whole.columns(columns.start - first, columns.stop - first)
