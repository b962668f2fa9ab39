"""Quantized weights as they are stored and sharded: integers, a scale a group, and what is added.

    w[i, j] = scale[i, j // g] * q[i, j] + offset[i, j // g]

covers the schemes that are read or made: int8 per channel, int4 in groups with or without a zero point
(round to nearest, GPTQ, AWQ), and GGUF's Q4_0, Q4_1 and Q8_0. This is the logical form, the same for
every world size and processor: it is cut for a rank first, and laid out for an instruction set last
(kernels/).

What is not here: how weights are quantized (weights.quantize, quantize/), how files store them
(weights.formats.quant_hf, weights.formats.gguf_blocks), and products.
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

    data: int8 [n, k], or for 4 bits uint8 [n, k / 2], two numbers 0..15 in each, the even column's in
    the lower half. scale and offset: float16 [n, k / group_size], or float32 where a half cannot hold
    them. Without an offset it is 0 for 8 bits and -8 * scale for 4: symmetric. `group_size` divides k.
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
        """Rows [start, stop): views."""
        return self.with_rows(lambda each: each[start:stop])

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> QuantWeight:
        """With `change` done to the rows of each tensor: some of them, or in another order."""
        offset = None if self.offset is None else change(self.offset)
        return replace(self, data=change(self.data), scale=change(self.scale), offset=offset)

    def padded(self, num_rows: int) -> QuantWeight:
        """With rows of zeros behind, up to `num_rows`."""
        more = num_rows - self.shape[0]
        return self.with_rows(lambda each: F.pad(each, (0, 0, 0, more))) if more else self

    def columns(self, start: int, stop: int) -> QuantWeight:
        """Columns [start, stop), the same numbers bit for bit. Where a border lies inside a group,
        groups become as small as the borders ask for, each with a copy of the scale. Raises InputError
        where that is below MIN_GROUP."""
        if self.scale.shape[1] == 1:  # one group a row: any part of it is one
            return self._cut(start, stop, self.scale, self.offset, stop - start)
        size = gcd(self.group_size, start, stop)
        if size < MIN_GROUP:
            raise InputError(
                f"columns {start} to {stop} of a weight quantized in groups of {self.group_size} "
                f"cannot be cut out: groups of {size} would be left, and {MIN_GROUP} is the least; use "
                "another number of ranks"
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
            raise InputError(f"columns {start} to {stop} of a weight of 4 bits cannot be cut out: odd")
        data = self.data[:, start // per_byte : stop // per_byte]
        return QuantWeight(data, scale, offset, self.bits, group_size)

    def integers(self) -> Tensor:
        """The numbers q: int8 [n, k], or uint8 for 4 bits."""
        if self.bits == 8:
            return self.data
        return torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k]: computed in float32, rounded once."""
        n, k = self.shape
        grouped = self.integers().float().view(n, k // self.group_size, self.group_size)
        scale = self.scale.float().unsqueeze(-1)
        if self.offset is not None:
            values = grouped * scale + self.offset.float().unsqueeze(-1)
        else:
            values = (grouped - (8 if self.bits == 4 else 0)) * scale
        return values.view(n, k).to(dtype)


def pack_nibbles(q: Tensor) -> Tensor:
    """Numbers 0..15, uint8 [n, k] (k even) -> two a byte, uint8 [n, k / 2]."""
    return q[:, ::2] | (q[:, 1::2] << 4)


def join_rows(parts: Sequence[QuantWeight]) -> QuantWeight:
    """Weights of equal columns and groups, one below the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(part.bits, part.group_size, part.offset is None) for part in parts}
    assert len(kinds) == 1, kinds
    offsets = [part.offset for part in parts if part.offset is not None]
    # Halves beside floats become floats.
    return replace(
        first,
        data=torch.cat([part.data for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        offset=torch.cat(offsets) if offsets else None,
    )
