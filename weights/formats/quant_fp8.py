"""The layouts of weights in E4M3: weight [n, k], and a scale of blocks, of rows or of the whole weight.

The scales are called `weight_scale_inv` (DeepSeek, Qwen, GLM; despite the name they are multiplied) or
`weight_scale`. Their shape says what they are of: [n / rows, k / columns] blocks, rounded up; [n, k /
columns] groups; [n], [n, 1] rows; [], [1] the weight. They are floats, or powers of two stored as
their exponents (E8M0, also as uint8). They are read as float32, which is exact, one for each row: the
blocks of a column of blocks become groups of columns. Only powers of two of groups of 32 stay as they
are (MXFP8). Scales of activations are ignored.

Source: `FP8Linear` and `Fp8Dequantize` of transformers; `NaiveQuantizationCompressor` of the library
compressed-tensors.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from weights.formats.quant_layouts import fp8_grid, scale_name
from weights.formats.quant_parts import (
    HALVES,
    POWERS,
    Cuts,
    Module,
    StoredMatrix,
    check_e4m3,
    check_e8m0,
    cuts_of_scales,
    factors_of,
    floats_checked,
    groups_of,
    part_of,
)
from weights.quant import QuantWeight
from weights.schemes import MXFP8

ENDS = frozenset({
    "weight_scale_inv", "weight_scale", "input_scale", "input_scale_ub", "activation_scale",
})  # fmt: skip


def open_stored(module: Module) -> StoredMatrix:
    """The weight of a module. Raises InputError."""
    codes, n, k = module.matrix("weight", ("F8_E4M3",))
    end = scale_name(module.parts)
    scales = module.part(end, (*HALVES, *POWERS))
    grid = fp8_grid(module.config, codes.shape, (scales.stored_as, scales.shape))
    if grid is None:
        raise module.error(
            f"{module.name}.{end} has shape {list(scales.shape)} for a weight of {[n, k]}"
        )
    scheme, height = grid  # `height` rows share the scales of their groups

    def read(rows: slice, columns: slice) -> QuantWeight:
        data = part_of(codes, rows, columns).contiguous().view(torch.uint8)
        check_e4m3(module, "weight", data)
        scale = of_rows(rows, groups_of(scheme, columns))
        return QuantWeight(data, "e4m3", factors_of(scheme, columns, scale))

    def of_rows(rows: slice, groups: slice) -> Tensor:
        """The scales of these groups, for each row."""
        if prod(scales.shape) == 1:
            one = values_of(part_of(scales, *(slice(0, 1) for _ in scales.shape)))
            return one.view(1, 1).repeat(rows.stop - rows.start, 1)
        down = slice(rows.start // height, -(-rows.stop // height))
        found = values_of(part_of(scales, *(down, groups)[: len(scales.shape)]))
        first = down.start * height
        fine = found.unsqueeze(1) if found.dim() == 1 else found
        fine = fine.repeat_interleave(height, 0)
        return fine[rows.start - first : rows.stop - first].contiguous()

    def values_of(stored: Tensor) -> Tensor:
        if scheme != MXFP8:
            return floats_checked(module, end, stored)
        check_e8m0(module, end, stored.contiguous().view(torch.uint8))
        return stored.contiguous().view(torch.uint8)

    cuts: dict[str, Cuts] = {
        "weight": ((0, 1), (1, 1)),
        end: cuts_of_scales(scales.shape, n, height, scheme.group_size or k),
    }
    return StoredMatrix((n, k), scheme, read, cuts)
