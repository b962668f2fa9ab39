"""The layout of AWQ (version "gemm"): qweight int32 [k, n / 8], qzeros int32 [groups, n / 8], scales
[groups, n]. Each int32 holds eight 4-bit numbers; number i, counted from the lowest bits, belongs to
column _ORDER[i] of the eight.

Source: `WQLinear_GEMM.from_linear` of AutoAWQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weights.formats.quant_parts import (
    HALVES,
    Cuts,
    Module,
    StoredMatrix,
    checked_zeros,
    factors_of,
    groups_of,
    part_of,
    scales_of,
    unpack_integers,
)
from weights.quant import QuantWeight

ENDS = frozenset({"qweight", "qzeros", "scales"})
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def open_stored(module: Module) -> StoredMatrix:
    """The weight of a module. Raises InputError."""
    packed, k, width = module.matrix("qweight", ("I32",))
    n = width * 8
    scales, groups, _ = module.matrix("scales", HALVES)
    scheme = module.scheme(4, groups, k)
    module.part("scales", HALVES, (groups, n))
    zeros = module.part("qzeros", ("I32",), (groups, width))

    def read(rows: slice, columns: slice) -> QuantWeight:
        across = slice(rows.start // 8, rows.stop // 8)
        some = groups_of(scheme, columns)
        q = _in_order(part_of(packed, columns, across)).t().contiguous()
        zero = _in_order(part_of(zeros, some, across)).t()
        scale, offset = scales_of(
            module,
            scheme,
            part_of(scales, some, rows).t().contiguous(),
            checked_zeros(module, scheme, zero, 8),
        )
        return QuantWeight(q, scheme.code_name, factors_of(scheme, columns, scale, offset))

    size = scheme.group_size or k
    cuts: dict[str, Cuts] = {
        "qweight": ((1, 1), (0, 8)),
        "qzeros": ((1, size), (0, 8)),
        "scales": ((1, size), (0, 1)),
    }
    return StoredMatrix((n, k), scheme, read, cuts, 8)


def _in_order(numbers: Tensor) -> Tensor:
    """Unpack int32 [m, n / 8] into uint8 [m, n], in the order of the columns."""
    places = sorted(range(8), key=_ORDER.__getitem__)
    eights = unpack_integers(numbers, 4).unflatten(-1, (numbers.shape[1], 8))
    return eights[..., torch.tensor(places)].flatten(-2)
