"""The layout of GPTQ: qweight int32 [k * bits / 32, n], packed along the rows, the lowest bits first;
qzeros int32 [groups, n * bits / 32]; scales [groups, n]; g_idx int32 [k], the group of each column.

Zero points are stored minus 1, modulo the range, except in the format gptq_v2. With act-order, g_idx is
not in order. The integers are in the order of weights.quant, so only a transposition is needed.

Source: `QuantLinear.pack` of AutoGPTQ's qlinear_cuda_old.py, and GPTQModel's conversion between its
formats.
"""

from __future__ import annotations

import torch

from weights.formats.quant_parts import (
    HALVES,
    Cuts,
    Module,
    StoredMatrix,
    checked_zeros,
    data_of,
    factors_of,
    group_of_columns,
    groups_of,
    part_of,
    scales_of,
    unpack_integers,
)
from weights.quant import QuantWeight

ENDS = frozenset({"qweight", "qzeros", "scales", "g_idx"})


def open_stored(module: Module) -> StoredMatrix:
    """The weight of a module. Raises InputError."""
    packed, height, n = module.matrix("qweight", ("I32",))
    scales, groups, _ = module.matrix("scales", HALVES)
    bits = module.config.bits_of(module.part("qzeros", ("I32",)).shape, n)
    k, per = height * 32 // bits, 32 // bits
    scheme = module.scheme(bits, groups, k)
    module.part("scales", HALVES, (groups, n))
    if n % per:
        raise module.error(f"{module.name}.qweight has {n} outputs, not a multiple of {per}")
    zeros = module.part("qzeros", ("I32",), (groups, n // per))
    size = scheme.group_size or k
    order = module.part("g_idx", ("I32", "I64"), (k,)) if "g_idx" in module.parts else None
    if order is None and module.config.reordered:
        module.part("g_idx", ("I32",))
    middle = 1 << (bits - 1)
    cuts: dict[str, Cuts] = {
        "qweight": ((1, per), (0, 1)),
        "qzeros": ((1, size), (0, per)),
        "scales": ((1, size), (0, 1)),
        "g_idx": ((1, 1),),
    }

    def read(rows: slice, columns: slice) -> QuantWeight:
        if order is not None and not module.config.reordered:
            given = part_of(order, columns).long()
            if not torch.equal(given, torch.arange(columns.start, columns.stop) // size):
                raise module.error(f"{module.name}.g_idx is not in order (act-order, desc_act)")
        down = slice(columns.start // per, columns.stop // per)
        some = groups_of(scheme, columns)
        octets = part_of(packed, down, rows).t().contiguous().view(torch.uint8)
        across = slice(rows.start // per, rows.stop // per)
        zero = unpack_integers(part_of(zeros, some, across), bits).t().to(torch.int16)
        if module.config.minus_one:
            zero = (zero + 1) & (2 * middle - 1)
        scale, offset = scales_of(
            module,
            scheme,
            part_of(scales, some, rows).t().contiguous(),
            checked_zeros(module, scheme, zero, middle),
        )
        groups = factors_of(scheme, columns, scale, offset)
        return QuantWeight(data_of(octets, bits), scheme.code_name, groups)

    if order is None or not module.config.reordered:
        return StoredMatrix((n, k), scheme, read, cuts, per)
    return StoredMatrix((n, k), scheme, read, cuts, per, group_of_columns(module, "g_idx", groups))
