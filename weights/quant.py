"""Quantised weights as they are stored and sharded: integers, a scale a group, and what is added.

    w[i, j] = scale[i, j // g] * q[i, j] + offset[i, j // g]

covers the schemes that are read or made: int8 per channel, int4 in groups with or without a zero point
(round to nearest, GPTQ, AWQ), and GGUF's Q4_0, Q4_1 and Q8_0. This is the logical form, the same for
every world size and processor: it is cut for a rank first, and laid out for an instruction set last
(kernels/).

What is not here: how weights are quantised (quantize/), and products.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from weights.errors import InputError

SCHEMES = (
    "int8",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g32-asym",
    "int4-g64-asym",
    "int4-g128-asym",
)
MIN_GROUP = 32  # numbers that a kernel takes with one scale at least


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised: `bits` a number (8 or 4), `group_size` numbers of a row that share a
    scale (0: the whole row), and whether zero lies in the middle of the range."""

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}"


def parse_scheme(text: str) -> Scheme:
    """The scheme of a name such as "int8" or "int4-g32-asym". Raises InputError."""
    found = re.fullmatch(r"int([48])(?:-g(\d+))?(-asym)?", text)
    if found is None or text not in SCHEMES:
        raise InputError(
            f"quant={text} is not a scheme that Yoke has; take one of {', '.join(SCHEMES)}"
        )
    return Scheme(int(found[1]), int(found[2] or 0), found[3] is None)


@dataclass(frozen=True)
class QuantWeight:
    """A matrix [n, k] (or some of its rows or columns), quantised.

    data: int8 [n, k], or for 4 bits uint8 [n, k / 2], two numbers 0..15 in each, the even column's in
    the lower half. scale and offset: float16 [n, k / group_size], or float32 where a half cannot hold them.
    Without an offset it is 0 for 8 bits and -8 * scale for 4: symmetric. `group_size` divides k.
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
        offset = None if self.offset is None else self.offset[start:stop]
        return QuantWeight(
            self.data[start:stop], self.scale[start:stop], offset, self.bits, self.group_size
        )

    def columns(self, start: int, stop: int) -> QuantWeight:
        """Columns [start, stop), the same numbers bit for bit. Where a border lies inside a group,
        groups become as small as the borders ask for, each with a copy of the scale. Raises InputError
        where that is below MIN_GROUP."""
        if self.scale.shape[1] == 1:  # one group a row: any part of it is one
            return self._cut(start, stop, self.scale, self.offset, stop - start)
        size = gcd(self.group_size, start, stop)
        if size < MIN_GROUP:
            raise InputError(
                f"columns {start} to {stop} of a weight quantised in groups of {self.group_size} cannot "
                f"be cut out: groups of {size} would be left, and {MIN_GROUP} is the least; use another "
                "number of ranks"
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

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
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
