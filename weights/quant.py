"""Quantized weights as they are stored and sharded: integers, and a scale and an offset per group.

    w[i, j] = scale[i, j // g] * q[i, j] + offset[i, j // g]

covers all schemes that are read or made: int8 per channel, int4 in groups with or without a zero point
(round to nearest, GPTQ, AWQ), and GGUF's Q4_0, Q4_1 and Q8_0. This is the logical form, the same for
every world size and processor. It is first sharded for a rank, and then packed for an instruction set
(kernels/).

What is not here: how weights are quantized (weights.quantize, quantize/), how files store them
(weights.formats.quant_hf, weights.formats.gguf_blocks), and matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import InputError
from weights.schemes import MIN_GROUP as MIN_GROUP
from weights.schemes import SCHEMES as SCHEMES
from weights.schemes import Scheme as Scheme
from weights.schemes import parse_scheme as parse_scheme


@dataclass(frozen=True)
class QuantWeight:
    """A matrix [n, k] (or some of its rows or columns), quantized.

    data: int8 [n, k], or for 4 bits uint8 [n, k / 2], two numbers 0..15 per byte, the even column in
    the lower half. scale and offset: float16 [n, k / group_size], or float32 if float16 cannot hold
    them. If `offset` is None, the weight is symmetric: the offset is 0 for 8 bits and -8 * scale for
    4 bits. `group_size` divides k.
    """

    data: Tensor
    scale: Tensor
    offset: Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def rows(self, start: int, stop: int) -> QuantWeight:
        """Rows [start, stop), as views."""
        return self.with_rows(lambda each: each[start:stop])

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> QuantWeight:
        """This weight with `change` applied to each tensor: it selects or reorders rows."""
        offset = None if self.offset is None else change(self.offset)
        return replace(self, data=change(self.data), scale=change(self.scale), offset=offset)

    def padded(self, num_rows: int) -> QuantWeight:
        """This weight with rows of zeros appended, up to `num_rows`."""
        more = num_rows - self.shape[0]
        return self.with_rows(lambda each: F.pad(each, (0, 0, 0, more))) if more else self

    def columns(self, start: int, stop: int) -> QuantWeight:
        """Columns [start, stop), the same numbers bit for bit. If `start` or `stop` is inside a group,
        groups are split to a size that divides both, each with a copy of the scale. Raises InputError
        if that size is below MIN_GROUP, or if 4-bit columns would start or end at an odd number."""
        if self.scale.shape[1] == 1:  # one group per row: any part of the row is one group
            return self._cut(start, stop, self.scale, self.offset, stop - start)
        size = gcd(self.group_size, start, stop)
        if size < MIN_GROUP:
            raise InputError(
                f"columns {start} to {stop} of a weight quantized in groups of {self.group_size} "
                f"cannot be cut out: that needs groups of {size}, and the smallest supported group is "
                f"{MIN_GROUP}; use another number of ranks"
            )
        times = self.group_size // size

        def cut(each: Tensor) -> Tensor:
            first, last = start // self.group_size, -(-stop // self.group_size)
            fine = each[:, first:last].repeat_interleave(times, dim=1)
            skip = (start - first * self.group_size) // size
            return fine[:, skip : skip + (stop - start) // size]

        offset = None if self.offset is None else cut(self.offset)
        return self._cut(start, stop, cut(self.scale), offset, size)

    def _cut(
        self, start: int, stop: int, scale: Tensor, offset: Tensor | None, group_size: int
    ) -> QuantWeight:
        per_byte = 8 // self.bits
        if start % per_byte or stop % per_byte:
            raise InputError(
                f"columns {start} to {stop} of a weight of 4 bits cannot be cut out: both numbers must "
                "be even; use another number of ranks"
            )
        data = self.data[:, start // per_byte : stop // per_byte]
        return QuantWeight(data, scale, offset, self.bits, group_size)

    def integers(self) -> Tensor:
        """The integers q: int8 [n, k], or uint8 for 4 bits."""
        if self.bits == 8:
            return self.data
        return torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k] in `dtype`: computed in float32, rounded once."""
        n, k = self.shape
        grouped = self.integers().float().view(n, k // self.group_size, self.group_size)
        scale = self.scale.float().unsqueeze(-1)
        if self.offset is not None:
            values = grouped * scale + self.offset.float().unsqueeze(-1)
        else:
            values = (grouped - (8 if self.bits == 4 else 0)) * scale
        return values.view(n, k).to(dtype)


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack numbers 0..15, uint8 [n, k] (k even), two per byte: uint8 [n, k / 2]."""
    return q[:, ::2] | (q[:, 1::2] << 4)


def join_rows(parts: Sequence[QuantWeight]) -> QuantWeight:
    """Concatenate the rows of weights with equal columns, bits and groups."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(part.bits, part.group_size, part.offset is None) for part in parts}
    assert len(kinds) == 1, kinds
    offsets = [part.offset for part in parts if part.offset is not None]
    # torch.cat promotes float16 with float32 to float32.
    return replace(
        first,
        data=torch.cat([part.data for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        offset=torch.cat(offsets) if offsets else None,
    )
