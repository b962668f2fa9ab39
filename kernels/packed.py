"""Plain bfloat16 weights, laid out as quantized ones are (csrc/quant.h), where products gain by it.

What: laying rows out, the product's form of them (`kernels.quant_linear` multiplies), and rows looked
up in them, so that a table that is also a head is held once. Columns are filled up to whole steps of
32, rows to whole panels of 32, with zeros.

What is not here: which layers hold their weights so (tp.layers, models.load).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels
from kernels.quant_linear import STEP, TILE, Packed

PANEL = 2 * TILE
PIECE_BYTES = 32 << 20  # of a weight of another dtype, as it is rounded


def prefers_packed() -> bool:
    """Whether this processor multiplies packed bfloat16 faster, few rows and many: it has AMX."""
    return has_kernels() and bool(torch.ops.yoke_kernels.prefers_packed())


def new_packed(n: int, k: int, device: torch.device | str = "cpu") -> Packed:
    """Room for a weight [n, k], to be filled by `PackedRows`: data uint8 [panels, steps, 2, 1024]."""
    data = torch.empty(
        -(-n // PANEL), -(-k // STEP), 2, 2 * TILE * STEP, dtype=torch.uint8, device=device
    )
    return Packed(data, None, None, 16, 0, n)


def clear_rows(data: Tensor, first: int) -> None:
    """Zeros from row `first` on, and for all rows of its panel: before others are filled."""
    data[first // PANEL :].zero_()


@dataclass(frozen=True)
class PackedRows:
    """Where a part of a weight goes: `count` rows from `first` on of what is packed in `data`."""

    data: Tensor
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.data.shape[1] * STEP * 2

    def rows(self, first: int, last: int) -> PackedRows:
        """Some of them."""
        return PackedRows(self.data, self.first + first, last - first)

    def fill(self, part: Tensor) -> None:
        """With [count, k] of any dtype and strides, rounded in pieces."""
        assert part.shape[0] == self.count, (part.shape, self.count)
        rows = max(PANEL, PIECE_BYTES // (2 * max(part.shape[1], 1)) // PANEL * PANEL)
        for start in range(0, self.count, rows):
            piece = part[start : start + rows].to(torch.bfloat16)
            torch.ops.yoke_kernels.pack_rows(self.data, piece, self.first + start)


def pack_bf16(weight: Tensor) -> Packed:
    """A whole weight, bfloat16 [n, k]; of one on the meta device, the room."""
    n, k = weight.shape
    packed = new_packed(n, k, weight.device)
    if weight.device.type != "meta":
        clear_rows(packed.data, n)
        PackedRows(packed.data, 0, n).fill(weight)
    return packed


def pack_reference(weight: Tensor) -> Tensor:
    """The data of `pack_bf16`, in torch."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % STEP, 0, -n % PANEL))
    # [panel, tile, row, step, pair, 2] -> [panel, step, tile, pair, row, 2]
    pairs = padded.view(-1, 2, TILE, padded.shape[1] // STEP, STEP // 2, 2).permute(0, 3, 1, 4, 2, 5)
    return pairs.contiguous().view(torch.uint8).flatten(3)


def packed_rows(tokens: Tensor, data: Tensor, k: int, start: int, count: int) -> Tensor:
    """Of each token the row `token - start` of `count` packed ones, and zeros where it is none of them:
    int64 [...] -> bfloat16 [..., k]."""
    return torch.ops.yoke_kernels.packed_rows(tokens, data, k, start, count)
