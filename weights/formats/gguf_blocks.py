"""Read GGUF's blocks as weights.quant: the table of block formats, and reading whole tensors.

`FORMS` has a row for each block format that stays quantized: the bytes and the numbers of a block, and
the function that unpacks blocks. Its row in weights.schemes.GGUF_SCHEMES says what the codes and
factors are. So another format is a function and two rows. The weight equals what the gguf package
dequantizes.

A scale that is infinite or no number is an error. Scales are checked as they are read; codes are not,
because each code has a value.

What is not here: unpacking (weights.formats.gguf_unpack, weights.formats.gguf_grids); formats without a
row (the ternary TQ1_0 and TQ2_0), which the gguf package dequantizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from base.errors import InputError
from weights.checkpoint import ReadQuant, Slices
from weights.formats import gguf_grids as grids
from weights.formats import gguf_unpack as unpack
from weights.formats.gguf_unpack import Found
from weights.quant import Factors, QuantWeight
from weights.schemes import GGUF_SCHEMES


class Form(NamedTuple):
    """A block format: the bytes and the numbers of a block, and the function that unpacks blocks (see
    weights.formats.gguf_unpack)."""

    bytes: int
    numbers: int
    unpack: Callable[[Tensor, Tensor], Found]


FORMS = {
    "Q4_0": Form(18, 32, unpack.q4_0),
    "Q4_1": Form(20, 32, unpack.q4_1),
    "Q5_0": Form(22, 32, unpack.q5_0),
    "Q5_1": Form(24, 32, unpack.q5_1),
    "Q8_0": Form(34, 32, unpack.q8_0),
    "IQ4_NL": Form(18, 32, unpack.q4_0),  # other values of the same bits
    "MXFP4": Form(17, 32, unpack.mxfp4),
    "NVFP4": Form(36, 64, unpack.nvfp4),
    "Q2_K": Form(84, 256, unpack.q2_k),
    "Q3_K": Form(110, 256, unpack.q3_k),
    "Q4_K": Form(144, 256, unpack.q4_k),
    "Q5_K": Form(176, 256, unpack.q5_k),
    "Q6_K": Form(210, 256, unpack.q6_k),
    "IQ4_XS": Form(136, 256, unpack.iq4_xs),
    "IQ3_XXS": Form(98, 256, grids.iq3_xxs),
    "IQ3_S": Form(110, 256, grids.iq3_s),
    "IQ2_XXS": Form(66, 256, grids.iq2_xxs),
    "IQ2_XS": Form(74, 256, grids.iq2_xs),
    "IQ2_S": Form(82, 256, grids.iq2_s),
    "IQ1_S": Form(50, 256, grids.iq1_s),
    "IQ1_M": Form(56, 256, grids.iq1_m),
}

_AT_ONCE = 1 << 20  # numbers that are unpacked at once, so that temporaries are small and stay in L2
# Of each kind that can be no number: the integer type, the bits without the sign, and the first of them
# that is infinite or no number.
_LIMITS = {
    "f16": (torch.int16, 0x7FFF, 0x7C00),
    "f32": (torch.int32, 0x7FFFFFFF, 0x7F800000),
    "e8m0": (torch.uint8, 0xFF, 0xFF),
    "e4m3": (torch.uint8, 0x7F, 0x7F),
}


def from_blocks(raw: Tensor, form: str) -> QuantWeight:
    """The quantized weight of stored whole blocks, uint8 [n, bytes]; `form` is a key of FORMS. Scales
    are not checked (`check_scales`)."""
    size, numbers, unpack_blocks = FORMS[form]
    n, per_row = raw.shape[0], raw.shape[1] // size
    codes = torch.empty(n, per_row * numbers, dtype=torch.uint8)
    found = []
    for first, last in _chunks(n, per_row * numbers):
        count = (last - first) * per_row
        blocks = raw[first:last].reshape(count, size)
        found.append(unpack_blocks(blocks, codes[first:last].view(count, numbers)))

    def joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        some = [part for part in parts if part is not None]
        return torch.cat(some).view(n, per_row * some[0].shape[1]) if some else None

    scale, offset, super_scale, super_offset = map(joined, zip(*found, strict=True))
    assert scale is not None
    scheme = GGUF_SCHEMES[form]
    groups = Factors(scheme.group_size, scale, offset, scheme.scale_kind)
    supers = None
    if super_scale is not None:
        supers = Factors(scheme.super_size, super_scale, super_offset, scheme.super_scales)
    data = codes.view(torch.int8) if scheme.code_name == "i8" else codes
    return QuantWeight(data, scheme.code_name, groups, supers)


def _chunks(n: int, k: int) -> list[tuple[int, int]]:
    """Ranges of rows, [first, last), that are unpacked at once; one that is empty for no rows."""
    step = max(_AT_ONCE // max(k, 1), 1)
    return [(first, min(first + step, n)) for first in range(0, max(n, 1), step)]


def check_scales(weight: QuantWeight, form: str, where: str) -> QuantWeight:
    """The same weight. Raises InputError, beginning with `where`, if a scale or an offset is infinite
    or no number."""
    for factors in (weight.groups, weight.supers):
        if factors is None or factors.kind not in _LIMITS:
            continue
        dtype, without_sign, limit = _LIMITS[factors.kind]
        for part in (factors.scale, factors.offset):
            if part is None or not part.numel():
                continue
            bits = part.view(dtype) & without_sign
            if int(bits.max()) >= limit:
                raise damaged_scale(where, form)
    return weight


def damaged_scale(where: str, form: str) -> InputError:
    """The error for a block with a scale that is infinite or no number."""
    return InputError(
        f"{where} is damaged: a {form} block has a scale that is infinite or not a number; copy the "
        "file again, or use another quantization of the model"
    )


def values_of_blocks(raw: Tensor, form: str, where: str) -> Tensor:
    """The values of stored whole blocks along the last dimension, uint8 [.., bytes] -> float32 [.., k].
    If the form has no row in FORMS, the gguf package dequantizes it. Raises InputError as
    `check_scales` does."""
    if form not in FORMS:
        return _values_by_the_package(raw, form, where)
    size, numbers, _ = FORMS[form]
    rows = raw.flatten(0, -2)
    n, k = rows.shape[0], rows.shape[1] // size * numbers
    values = torch.empty(n, k)
    for first, last in _chunks(n, k):
        weight = check_scales(from_blocks(rows[first:last], form), form, where)
        values[first:last] = weight.dequantize()
    return values.view(*raw.shape[:-1], k)


def _values_by_the_package(raw: Tensor, form: str, where: str) -> Tensor:
    import numpy as np
    from gguf import GGMLQuantizationType  # imported only for quantized weights
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # the error below says more than a warning
        found = dequantize(raw.contiguous().numpy(), GGMLQuantizationType[form])
    values = torch.from_numpy(found)
    if not bool(values.isfinite().all()):
        raise damaged_scale(where, form)
    return values


def reader_of_blocks(
    form: str, shape: tuple[int, ...], read_raw: Callable[[Slices], Tensor], where: str
) -> ReadQuant | None:
    """A function that reads a matrix of blocks as a quantized weight; None if it is not a matrix or the
    block format is not kept. `where` names file and tensor in errors; `read_raw` may return views."""
    if form not in FORMS or len(shape) != 2:
        return None
    return partial(_read, form, read_raw, where, ())


def reader_of_stacked_blocks(
    form: str, shape: tuple[int, ...], read_raw: Callable[[Slices], Tensor], where: str
) -> Callable[[int, slice, slice], QuantWeight] | None:
    """As `reader_of_blocks`, for one matrix of a stack, by its index."""
    if form not in FORMS or len(shape) != 3:
        return None

    def quant_of(index: int, rows: slice, columns: slice) -> QuantWeight:
        return _read(form, read_raw, where, (slice(index, index + 1),), rows, columns)

    return quant_of


def _read(
    form: str,
    read_raw: Callable[[Slices], Tensor],
    where: str,
    matrix: Slices,
    rows: slice,
    columns: slice,
) -> QuantWeight:
    """The columns may begin or end inside a block: it is read, and cut."""
    numbers = FORMS[form].numbers
    first, last = columns.start // numbers * numbers, -(-columns.stop // numbers) * numbers
    raw = read_raw((*matrix, rows, slice(first, last)))
    whole = check_scales(from_blocks(raw.flatten(0, -2), form), form, where)
    return whole.columns(columns.start - first, columns.stop - first)
