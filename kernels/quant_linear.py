"""y = x W^T with packed weights, quantized or bfloat16.

What: the packed layout (`pack`, `unpack`; csrc/quant.h shows it), the linear for any number of rows,
and the slow reference in torch. With few rows the linear is memory-bound: each weight is read once. So
it multiplies the codes' values as they are read, and scales only the sums of 16 or 32 of them.

A packed weight is a list of parts: the rows of a fused weight may have different codes and scales, and
one call multiplies them all.

What is not here: how weights are quantized, and their unpacked form (weights/quant.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import InputError
from kernels.load import has_kernels
from kernels.sizes import LINE, PANEL, STEP
from weights.quant import CODES, FINE_GROUPS, Factors, QuantWeight

TILE = PANEL // 2  # rows of a tile

# In the order of `Codes` and `Kind` in csrc/quant.h.
CODE_NAMES = ("bf16", "i8", "e4m3", "i4", "u4", "iq4", "e2m1", "u2", "i3", "i5", "u5", "i6")
KINDS = ("", "f16", "f32", "i8", "u8", "e8m0", "e4m3", "u4")
_DTYPES = {"f16": torch.float16, "f32": torch.float32, "i8": torch.int8}


class Part(NamedTuple):
    """Some rows of a packed weight, as numbers that operators take (`part_of` in csrc/ops_quant.cpp).

    codes, group_kind, super_kind: indexes of CODE_NAMES and KINDS. num_rows, k: the shape. group_size:
    16 or 32, the columns of one group; 0 if there are no factors of this kind. super_size: the columns
    of a larger group; its first one begins `super_skip` columns before the weight. offsets: 1 if there
    are any.
    """

    codes: int
    num_rows: int
    k: int
    group_kind: int = 0
    group_size: int = 0
    super_kind: int = 0
    super_size: int = 0
    super_skip: int = 0
    offsets: int = 0

    @property
    def code_name(self) -> str:
        return CODE_NAMES[self.codes]

    @property
    def panels(self) -> int:
        return -(-self.num_rows // PANEL)

    @property
    def steps(self) -> int:
        return -(-self.k // STEP)

    @property
    def panel_bytes(self) -> int:
        return sum(self.sections())

    @property
    def nbytes(self) -> int:
        return self.panels * self.panel_bytes

    def sections(self) -> tuple[int, int, int, int, int]:
        """The bytes of a panel's sections, each padded to whole lines: codes, scales and offsets of
        groups, scales and offsets of super-groups."""
        bits = 16 if self.codes == 0 else CODES[self.code_name].bits
        groups = self.steps * STEP // self.group_size if self.group_size else 0
        supers = -(-(self.super_skip + self.k) // self.super_size) if self.super_size else 0
        fine = _lines(groups * PANEL * _item(self.group_kind))
        coarse = _lines(supers * PANEL * _item(self.super_kind))
        own_offsets = self.offsets and KINDS[self.group_kind] != "u4"
        return (
            self.steps * STEP * PANEL * bits // 8,
            fine,
            fine if own_offsets else 0,
            coarse,
            coarse if self.offsets else 0,
        )


class Packed(NamedTuple):
    """A weight [n, k] in the operator's packed layout: the panels of one part after another. Rows that
    pad the last panel of a part have scales of zero.

    data: uint8 of any shape, contiguous; `parts` describe it. bfloat16 is a part without factors.
    """

    data: Tensor
    parts: tuple[Part, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def numbers(self) -> list[int]:
        """`parts` as the operators take them."""
        return [number for part in self.parts for number in part]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def each(self) -> Iterator[tuple[Part, Tensor]]:
        """Yields each part with its bytes, uint8 [panels, panel bytes]."""
        flat, start = self.data.view(-1), 0
        for part in self.parts:
            yield part, flat[start : start + part.nbytes].view(part.panels, -1)
            start += part.nbytes


def parts_of(numbers: Sequence[int]) -> tuple[Part, ...]:
    """The inverse of `Packed.numbers`."""
    size = len(Part._fields)
    return tuple(Part(*numbers[i : i + size]) for i in range(0, len(numbers), size))


def part_of(weight: QuantWeight) -> Part:
    """How a quantized weight is packed. Raises InputError if its columns are not whole steps of 32 (16
    for groups of 16), or groups are of other sizes."""
    n, k = weight.shape
    groups: Factors | None = weight.groups
    supers = weight.supers
    assert groups is not None
    unit = groups.size if groups.size in FINE_GROUPS else STEP
    if groups.size not in FINE_GROUPS and supers is None:
        groups, supers = None, groups
    odd = (
        supers is not None and supers.scale.shape[1] > 1 and (supers.size % STEP or supers.skip % STEP)
    )
    if k % unit or odd:
        raise InputError(
            f"a quantized weight of {k} columns in groups of {weight.group_size} cannot be packed: "
            f"both must be multiples of {unit}; use another number of ranks, or do not quantize it"
        )
    assert groups is None or (groups.size in FINE_GROUPS and groups.skip == 0), groups
    return Part(
        CODE_NAMES.index(weight.codes),
        n,
        k,
        0 if groups is None else KINDS.index(groups.kind),
        0 if groups is None else groups.size,
        0 if supers is None else KINDS.index(supers.kind),
        0 if supers is None else supers.size,
        0 if supers is None else supers.skip,
        int(weight.offset is not None),
    )


def pack(*weights: QuantWeight) -> Packed:
    """Pack quantized weights with equally many columns as the parts of one. Raises InputError as
    `part_of` does."""
    parts = tuple(part_of(weight) for weight in weights)
    assert len({part.k for part in parts}) == 1, parts
    data = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8)
    packed = Packed(data, parts)
    for weight, (part, panels) in zip(weights, packed.each(), strict=True):
        _fill(weight, part, panels)
    return packed


def _fill(weight: QuantWeight, part: Part, panels: Tensor) -> None:
    """Write the bytes of a part."""
    codes, *sections = panels.split(part.sections(), dim=1)
    if has_kernels():
        torch.ops.yoke_kernels.pack_codes(codes, weight.data.contiguous(), part.codes)
    else:
        codes.copy_(pack_codes_reference(weight.data, part.code_name))
    both = (weight.groups, weight.supers) if part.group_size else (None, weight.groups)
    for factors, per_step, (scale, offset) in zip(
        both, (STEP // (part.group_size or STEP), 1), (sections[:2], sections[2:]), strict=True
    ):
        if factors is None:
            continue
        own = factors.offset
        if KINDS[part.group_kind] == "u4" and factors is both[0]:
            assert own is not None
            _put(scale, _in_panels(factors.scale | own << 4, per_step))
            continue
        dtype = _DTYPES.get(factors.kind, torch.uint8)
        _put(scale, _in_panels(factors.scale.to(dtype), per_step))
        if own is not None:
            _put(offset, _in_panels(own.to(dtype), per_step))


def _put(section: Tensor, numbers: Tensor) -> None:
    octets = numbers.view(numbers.shape[0], -1).view(torch.uint8)
    section[:, : octets.shape[1]] = octets
    section[:, octets.shape[1] :] = 0


def unpack(packed: Packed) -> list[QuantWeight]:
    """The inverse of `pack`."""
    return [_unpack(part, panels) for part, panels in packed.each()]


def _unpack(part: Part, panels: Tensor) -> QuantWeight:
    assert part.codes, "bfloat16 is not quantized"
    codes, scale, offset, super_scale, super_offset = panels.split(part.sections(), dim=1)
    data = unpack_codes(codes, part.code_name)[: part.num_rows, : part.k]
    groups = supers = None
    if part.group_size:
        count = part.steps * STEP // part.group_size
        own = _factors(scale, part.group_kind, count, STEP // part.group_size)[: part.num_rows]
        own = own[:, : part.k // part.group_size]
        added: Tensor | None = None
        kind = KINDS[part.group_kind]
        if kind == "u4":
            own, added = own & 15, own >> 4
        elif part.offsets:
            added = _factors(offset, part.group_kind, count, STEP // part.group_size)
            added = added[: part.num_rows, : part.k // part.group_size]
        groups = Factors(part.group_size, own, added, kind)
    if part.super_size:
        count = -(-(part.super_skip + part.k) // part.super_size)
        own = _factors(super_scale, part.super_kind, count, 1)[: part.num_rows]
        added = None
        if part.offsets:
            added = _factors(super_offset, part.super_kind, count, 1)[: part.num_rows]
        supers = Factors(part.super_size, own, added, KINDS[part.super_kind], part.super_skip)
    if groups is None:
        groups, supers = supers, None
    assert groups is not None
    return QuantWeight(data.contiguous(), part.code_name, groups, supers)


def pack_codes_reference(data: Tensor, codes: str) -> Tensor:
    """Codes [n, k], one per byte, in the packed layout: uint8 [panels, bytes]. The slow reference."""
    octets = F.pad(data.view(torch.uint8), (0, -data.shape[1] % STEP, 0, -data.shape[0] % PANEL))
    # [panel, tile, row, step, pair, 2] -> [panel, step, tile, pair, row, 2]
    pairs = octets.view(-1, 2, TILE, octets.shape[1] // STEP, STEP // 2, 2).permute(0, 3, 1, 4, 2, 5)
    if CODES[codes].bits == 8:
        return pairs.flatten(1)
    found = []
    for shift, bits in planes(CODES[codes].bits):
        plane = (pairs >> shift) & ((1 << bits) - 1)
        found.append(_plane(plane.int(), bits).flatten(3))
    return torch.cat(found, dim=-1).flatten(1)


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """The planes that codes are stored in: (lowest bit, bits) of each."""
    return {
        2: ((0, 2),), 3: ((0, 2), (2, 1)), 4: ((0, 4),), 5: ((0, 4), (4, 1)), 6: ((0, 4), (4, 2)),
    }[bits]  # fmt: skip


def _places(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields where a plane of `bits` has a row's numbers: (pair, number of it, word, lowest bit)."""
    for pair in range(STEP // 2):
        for second in range(2):
            four, at = divmod(pair, 4)
            nibble = at + 4 * second  # within the four pairs
            per_word = 32 // (8 * bits)  # groups of four pairs in a word
            word, inside = divmod(four, per_word)
            shift = 8 * (nibble // 2) + bits * (2 * inside + nibble % 2)
            yield pair, second, word, shift


def _plane(pairs: Tensor, bits: int) -> Tensor:
    """One plane: int32 [.., 16 pairs, 16 rows, 2] -> uint8 [.., words, 16 rows, 4]."""
    words = pairs.new_zeros((*pairs.shape[:3], bits, TILE))
    for pair, second, word, shift in _places(bits):
        words[..., word, :] |= pairs[..., pair, :, second] << shift
    return words.view(torch.uint8).unflatten(-1, (TILE, 4))


def unpack_codes(panels: Tensor, codes: str) -> Tensor:
    """The inverse of `pack_codes_reference`: uint8 [panels, bytes] -> [rows, columns], padded; int8 for
    "i8"."""
    bits = CODES[codes].bits
    tiles = panels.reshape(panels.shape[0], -1, 2, STEP * TILE * bits // 8)
    if bits == 8:
        pairs = tiles.unflatten(-1, (STEP // 2, TILE, 2))
    else:
        pairs = tiles.new_zeros((*tiles.shape[:3], STEP // 2, TILE, 2), dtype=torch.int32)
        start = 0
        for lowest, own in planes(bits):
            words = tiles[..., start : start + own * 4 * TILE].contiguous().view(torch.int32)
            words = words.unflatten(-1, (own, TILE))
            start += own * 4 * TILE
            for pair, second, word, shift in _places(own):
                code = (words[..., word, :] >> shift) & ((1 << own) - 1)
                pairs[..., pair, :, second] |= code << lowest
        pairs = pairs.to(torch.uint8)
    rows = pairs.permute(0, 2, 4, 1, 3, 5).reshape(panels.shape[0] * PANEL, -1)
    return rows.view(torch.int8) if codes == "i8" else rows


def unpack_bf16(panels: Tensor, part: Part) -> Tensor:
    """The bfloat16 weight [n, k] of a packed 16-bit one: the inverse of `kernels.packed.pack_bf16`."""
    pairs = panels.view(torch.bfloat16).reshape(part.panels, part.steps, 2, STEP // 2, TILE, 2)
    rows = pairs.permute(0, 2, 4, 1, 3, 5).reshape(part.panels * PANEL, part.steps * STEP)
    return rows[: part.num_rows, : part.k]


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [n, k] of any packed one."""
    return torch.cat(
        [
            _unpack(part, panels).dequantize(dtype) if part.codes
            else unpack_bf16(panels, part).to(dtype)
            for part, panels in packed.each()
        ]
    )  # fmt: skip


def quant_linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, round_x: bool = False
) -> Tensor:
    """[..., k] x [n, k] -> [..., n] of x's dtype. With bfloat16 on a CPU, the codes' values are
    multiplied, sums are scaled in float32 and rounded once; in all other cases the reference runs.

    The method depends on the processor, the codes and the number of rows of x. Few rows times codes of
    at most 6 bits may use integer arithmetic: each 32 numbers of x are quantized to 16 bits of their
    largest, and the sums of a step are exact. From 17 rows on, matrix units (AMX) multiply weights that
    were scaled and rounded to bfloat16, or the values where each row has a single scale. Plain bfloat16
    weights use them from 5 rows on. `round_x`: if there are also matrix units for int8, the weights are
    int8 with one scale per row, and x has 33 rows or more, each row of x is rounded to 255 steps around
    zero, and the sums are exact.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_kernels():
        return torch.ops.yoke_kernels.quant_linear(x, packed.data, packed.numbers, bias, round_x)
    return quant_linear_reference(x, packed, bias)


def quant_linear_reference(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """As `quant_linear`, slowly, on any device: the weight and the matmul are in float32 (float64 if x
    is), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(packed, wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def _item(kind: int) -> int:
    return {"": 0, "f16": 2, "f32": 4}.get(KINDS[kind], 1)


def _lines(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE


def _in_panels(factor: Tensor, per_step: int) -> Tensor:
    """[n, groups] -> [panels, steps, 2, per_step, 16], padded with zeros."""
    padded = F.pad(factor, (0, -factor.shape[1] % per_step, 0, -factor.shape[0] % PANEL))
    tiles = padded.view(-1, 2, TILE, padded.shape[1] // per_step, per_step)
    return tiles.permute(0, 3, 1, 4, 2).contiguous()


def _factors(section: Tensor, kind: int, groups: int, per_step: int) -> Tensor:
    """The inverse of `_in_panels`: the bytes of a section -> [rows, groups]."""
    item = _item(kind)
    octets = section[:, : groups * PANEL * item].contiguous()
    numbers = octets.view(_DTYPES.get(KINDS[kind], torch.uint8))
    tiles = numbers.view(-1, groups // per_step, 2, per_step, TILE)
    return tiles.permute(0, 2, 4, 1, 3).reshape(-1, groups).contiguous()
