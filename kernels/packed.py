"""Plain bfloat16 weights in the packed layout of quantized ones (csrc/quant.h): where that is faster,
and beside quantized parts of the same weight.

What: packing rows, and looking rows up in packed data, so that an embedding table that is also the head
is stored once; these may be quantized. Columns are padded with zeros to whole steps of 32, rows to
whole panels of 32.

What is not here: the matmul (kernels.quant_linear); which layers are packed (tp.layers, models.load).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels
from kernels.quant_linear import TILE, Packed, Part, dequantize, pack
from kernels.sizes import PANEL, STEP
from weights.quant import QuantWeight

PIECE_BYTES = 32 << 20  # at a time, when a weight of another dtype is rounded to bfloat16


def prefers_packed() -> bool:
    """Whether packed bfloat16 is faster on this processor, for few rows and for many: it has AMX."""
    return has_kernels() and bool(torch.ops.yoke_kernels.prefers_packed())


def new_packed(n: int, k: int, device: torch.device | str = "cpu") -> Packed:
    """An uninitialized packed weight [n, k], uint8 [panels, steps, 2, 1024]; `PackedRows` fills it."""
    data = torch.empty(
        -(-n // PANEL), -(-k // STEP), 2, 2 * TILE * STEP, dtype=torch.uint8, device=device
    )
    return Packed(data, (Part(0, n, k),))


def clear_rows(data: Tensor, first: int) -> None:
    """Set all panels to zero from that of row `first` on. Call this before any rows are filled."""
    data[first // PANEL :].zero_()


@dataclass(frozen=True)
class PackedRows:
    """A range of rows in the packed `data`: `count` rows from row `first` on. `fill` writes them."""

    data: Tensor
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.data.shape[1] * STEP * 2

    def rows(self, first: int, last: int) -> PackedRows:
        """Rows `[first, last)` of this range."""
        return PackedRows(self.data, self.first + first, last - first)

    def fill(self, part: Tensor) -> None:
        """Write `part`, [count, k] of any dtype and strides, rounded to bfloat16 piece by piece."""
        assert part.shape[0] == self.count, (part.shape, self.count)
        rows = max(PANEL, PIECE_BYTES // (2 * max(part.shape[1], 1)) // PANEL * PANEL)
        for start in range(0, self.count, rows):
            piece = part[start : start + rows].to(torch.bfloat16)
            torch.ops.yoke_kernels.pack_rows(self.data, piece, self.first + start)


def pack_bf16(weight: Tensor) -> Packed:
    """Pack a whole weight, bfloat16 [n, k]. For a weight on the meta device only the shapes are
    made."""
    n, k = weight.shape
    if weight.device.type != "meta" and not has_kernels():
        return Packed(pack_reference(weight.to(torch.bfloat16)), (Part(0, n, k),))
    packed = new_packed(n, k, weight.device)
    if weight.device.type != "meta":
        clear_rows(packed.data, n)
        PackedRows(packed.data, 0, n).fill(weight)
    return packed


def pack_reference(weight: Tensor) -> Tensor:
    """The data of `pack_bf16`, in plain torch: the slow reference."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % STEP, 0, -n % PANEL))
    # [panel, tile, row, step, pair, 2] -> [panel, step, tile, pair, row, 2]
    pairs = padded.view(-1, 2, TILE, padded.shape[1] // STEP, STEP // 2, 2).permute(0, 3, 1, 4, 2, 5)
    return pairs.contiguous().view(torch.uint8).flatten(3)


def pack_parts(weights: Sequence[QuantWeight | Tensor]) -> Packed:
    """Pack weights with equally many columns as the parts of one: quantized ones as they are, plain
    ones as bfloat16. Raises InputError as `kernels.quant_linear.part_of` does."""
    quantized = [weight for weight in weights if isinstance(weight, QuantWeight)]
    if len(quantized) == len(weights):
        return pack(*quantized)
    each = [pack(w) if isinstance(w, QuantWeight) else pack_bf16(w) for w in weights]
    parts = tuple(part for packed in each for part in packed.parts)
    assert len({part.k for part in parts}) == 1, parts
    return Packed(torch.cat([packed.data.flatten() for packed in each]), parts)


def packed_rows(
    tokens: Tensor, table: Packed, start: int, count: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Look up rows in a packed weight of one part, dequantized: int64 [...] -> `dtype` [..., k]. A
    token gets row `token - start`, or zeros if that is not in [0, count)."""
    if dtype == torch.bfloat16 and tokens.device.type == "cpu" and has_kernels():
        return torch.ops.yoke_kernels.packed_rows(tokens, table.data, table.numbers, start, count)
    return packed_rows_reference(tokens, table, start, count, dtype)


def packed_rows_reference(
    tokens: Tensor, table: Packed, start: int, count: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """As `packed_rows`, in plain torch: the slow reference. It dequantizes the panel of each token."""
    ((part, panels),) = table.each()
    local = tokens.flatten() - start
    inside = (local >= 0) & (local < count)
    local = local.clamp(0, count - 1)
    chosen = Packed(panels[local // PANEL], (part._replace(num_rows=PANEL * len(local)),))
    rows = dequantize(chosen, dtype).view(-1, PANEL, part.k)
    found = rows[torch.arange(len(local), device=local.device), local % PANEL]
    return found.masked_fill(~inside.unsqueeze(1), 0).view(*tokens.shape, part.k)
