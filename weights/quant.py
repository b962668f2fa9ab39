"""Quantized weights as they are sharded: codes, and scales and offsets of groups.

    w[i, j] = scale(i, j) * value(q[i, j]) + offset(i, j)

`value` is the code's (weights.schemes.CODES). Scale and offset are those of the group of column j, each
times that of its super-group if there are any. This covers all schemes that are read or made: integers
per channel or in groups, with or without a zero point (round to nearest, GPTQ, AWQ), GGUF's blocks with
their super-blocks, and floats of 8 or 4 bits. It is the logical form, the same for every world size and
processor: first sharded for a rank, then packed for an instruction set (kernels/).

What is not here: how weights are quantized (weights.quantize, quantize/), how files store them
(weights.formats.quant_hf, weights.formats.gguf_blocks), and matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import InputError
from weights.schemes import CODES as CODES
from weights.schemes import FINE_GROUPS as FINE_GROUPS
from weights.schemes import MIN_GROUP as MIN_GROUP
from weights.schemes import SCHEMES as SCHEMES
from weights.schemes import Scheme as Scheme
from weights.schemes import parse_scheme as parse_scheme

_KINDS = {torch.float16: "f16", torch.float32: "f32", torch.int8: "i8", torch.uint8: "u8"}


@dataclass(frozen=True)
class Factors:
    """A factor of the scales, and of the offsets if there are any, for groups of `size` columns.

    scale: [n, groups] of float16, float32, int8 or uint8; offset: the same, or None. `kind` is a key of
    weights.schemes.FACTOR_BYTES, by default that of the tensors ("f32" where they differ); "e8m0" and
    "e4m3" are floats of 8 bits, held as uint8; "u4" is uint8 below 16. The first group begins `skip`
    columns before the weight does, the last one may end after it: the weight is a part of a larger one.
    """

    size: int
    scale: Tensor
    offset: Tensor | None = None
    kind: str = ""
    skip: int = 0

    def __post_init__(self) -> None:
        if not self.kind:
            dtype = self.scale.dtype
            if self.offset is not None:
                dtype = torch.promote_types(dtype, self.offset.dtype)
            object.__setattr__(self, "kind", _KINDS[dtype])

    @property
    def nbytes(self) -> int:
        return self.scale.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> Factors:
        offset = None if self.offset is None else change(self.offset)
        return replace(self, scale=change(self.scale), offset=offset)

    def columns(self, start: int, stop: int, k: int) -> Factors:
        """Those of columns [start, stop) of a weight of `k` columns."""
        if self.scale.shape[1] == 1:  # one group per row: any part of the row is one group
            return replace(self, size=stop - start, skip=0)
        first = (start + self.skip) // self.size
        last = max(-(-(stop + self.skip) // self.size), first)
        skip = start + self.skip - first * self.size
        return replace(self.with_rows(lambda each: each[:, first:last]), skip=skip)

    def spread(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of each of the `k` columns, float32 [n, k]."""

        def each_column(factor: Tensor) -> Tensor:
            fine = floats_of(factor, self.kind).repeat_interleave(self.size, dim=1)
            return fine[:, self.skip : self.skip + k]

        return each_column(self.scale), None if self.offset is None else each_column(self.offset)


@dataclass(frozen=True)
class QuantWeight:
    """A matrix [n, k] (or some of its rows or columns), quantized.

    data: uint8 [n, k], a code per byte; int8 for codes "i8". `codes` is a key of CODES. `groups` has
    the scales and offsets; if there are `supers`, these are multiplied by them. Without offsets the
    value of a code alone is scaled.
    """

    data: Tensor
    codes: str
    groups: Factors
    supers: Factors | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def bits(self) -> int:
        return CODES[self.codes].bits

    @property
    def group_size(self) -> int:
        return self.groups.size

    @property
    def scale(self) -> Tensor:
        return self.groups.scale

    @property
    def offset(self) -> Tensor | None:
        return self.groups.offset

    def rows(self, start: int, stop: int) -> QuantWeight:
        """Rows [start, stop), as views."""
        return self.with_rows(lambda each: each[start:stop])

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> QuantWeight:
        """This weight with `change` applied to each tensor: it selects or reorders rows."""
        supers = None if self.supers is None else self.supers.with_rows(change)
        groups = self.groups.with_rows(change)
        return replace(self, data=change(self.data), groups=groups, supers=supers)

    def padded(self, num_rows: int) -> QuantWeight:
        """This weight with rows of zeros appended, up to `num_rows`. (Their codes are 0 and so are
        their scales: the smallest scale of kind "e8m0" is not 0, but there the value of code 0 is.)"""
        more = num_rows - self.shape[0]
        return self.with_rows(lambda each: F.pad(each, (0, 0, 0, more))) if more else self

    def columns(self, start: int, stop: int) -> QuantWeight:
        """Columns [start, stop), the same numbers bit for bit. Raises InputError if `start` or `stop`
        is inside a group of 16 or 32, or not a multiple of 32 in larger groups."""
        k = self.shape[1]
        if (start, stop) == (0, k):
            return self
        unit = self.group_size if self.group_size in FINE_GROUPS else MIN_GROUP
        whole_rows = self.groups.scale.shape[1] == 1
        if (stop - start) % unit or (start % unit and not whole_rows):
            raise InputError(
                f"columns {start} to {stop} of a weight of {k} cannot be cut out: both must be "
                f"multiples of {unit}, the smallest part with a scale of its own; use another number "
                "of ranks"
            )
        supers = self.supers
        groups = self.groups
        if supers is not None and start % MIN_GROUP and supers.scale.shape[1] > 1:
            groups, supers = self._multiplied(), None
        return QuantWeight(
            self.data[:, start:stop],
            self.codes,
            groups.columns(start, stop, k),
            None if supers is None else supers.columns(start, stop, k),
        )

    def _multiplied(self) -> Factors:
        """The product of both factors in float32, which is exact. Kernels cannot have a border of
        super-groups inside a step of 32 columns."""
        groups, supers = self.groups, self.supers
        assert supers is not None and supers.size % groups.size == 0
        count = groups.scale.shape[1]
        of_groups = replace(supers, size=supers.size // groups.size, skip=supers.skip // groups.size)
        scale, offset = of_groups.spread(count)
        own = floats_of(groups.scale, groups.kind) * scale
        added = None
        if offset is not None and groups.offset is not None:
            added = floats_of(groups.offset, groups.kind) * offset
        return Factors(groups.size, own, added, "f32", groups.skip)

    def values(self) -> Tensor:
        """The values of the codes, float32 [n, k]."""
        return _values_of(self.data, self.codes)

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the offset of each number, float32 [n, k]."""
        k = self.shape[1]
        scale, offset = self.groups.spread(k)
        if self.supers is not None:
            more, added = self.supers.spread(k)
            scale = scale * more
            offset = None if offset is None or added is None else offset * added
        return scale, offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k] in `dtype`: computed in float32, rounded once."""
        scale, offset = self.scales()
        values = self.values().mul_(scale)
        return (values if offset is None else values.add_(offset)).to(dtype)


def _values_of(data: Tensor, codes: str) -> Tensor:
    if codes == "i8":
        return data.float()
    if codes == "e4m3":
        return data.view(torch.float8_e4m3fn).float()
    return torch.tensor(CODES[codes].values, dtype=torch.float32, device=data.device)[data.int()]


def floats_of(factor: Tensor, kind: str) -> Tensor:
    """A factor as float32."""
    if kind == "e4m3":
        return factor.view(torch.float8_e4m3fn).float()
    if kind == "e8m0":
        return powers_of_two(str(factor.device))[factor.int()]
    return factor.float()


@cache
def powers_of_two(device: str = "cpu") -> Tensor:
    """The value of each E8M0 code: 2 ** (code - 127), and NaN for 255."""
    values = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    values[255] = torch.nan
    return values.float().to(device)


def unpack_nibbles(data: Tensor) -> Tensor:
    """Unpack numbers 0..15, two per byte, the first in its lower half: uint8 [n, k / 2] -> [n, k]."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def pack_nibbles(q: Tensor) -> Tensor:
    """The inverse of `unpack_nibbles`: uint8 [n, k] (k even) -> [n, k / 2]."""
    return q[:, ::2] | (q[:, 1::2] << 4)


def integer_weight(
    data: Tensor, scale: Tensor, offset: Tensor | None, bits: int, group_size: int
) -> QuantWeight:
    """A weight of integers of 8 bits (int8 [n, k]) or 4 bits (uint8 [n, k], 0 to 15), with a scale and
    perhaps an offset for `group_size` numbers. Without offsets, 8 is subtracted from 4-bit integers."""
    codes = "i8" if bits == 8 else "i4" if offset is None else "u4"
    return QuantWeight(data, codes, Factors(group_size, scale, offset))


def join_rows(parts: Sequence[QuantWeight]) -> QuantWeight:
    """Concatenate the rows of weights with equal columns, codes and groups."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(part.codes, _shape_of(part.groups), _shape_of(part.supers)) for part in parts}
    assert len(kinds) == 1, kinds
    supers = [part.supers for part in parts if part.supers is not None]
    return QuantWeight(
        torch.cat([part.data for part in parts]),
        first.codes,
        _join([part.groups for part in parts]),
        _join(supers) if supers else None,
    )


def _shape_of(factors: Factors | None) -> tuple[int, int, bool] | None:
    return None if factors is None else (factors.size, factors.skip, factors.offset is None)


def _join(parts: Sequence[Factors]) -> Factors:
    # torch.cat promotes float16 with float32 to float32.
    offsets = [part.offset for part in parts if part.offset is not None]
    scale = torch.cat([part.scale for part in parts])
    offset = torch.cat(offsets) if offsets else None
    kind = parts[0].kind if len({part.kind for part in parts}) == 1 else "f32"  # beside float16
    return Factors(parts[0].size, scale, offset, kind, parts[0].skip)
