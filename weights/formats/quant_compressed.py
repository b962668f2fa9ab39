"""The layout of compressed-tensors (llm-compressor). "pack-quantized": weight_packed int32
[n, k * bits / 32], the lowest bits first, weight_shape [2], weight_scale [n, groups], with zero points
weight_zero_point int32 [n * bits / 32, groups], and with act-order weight_g_idx [k]. "int-quantized":
weight int8 [n, k], weight_scale [n, groups] (or one scale for all), weight_zero_point int8.

Packed numbers are stored with half the range added. Scales of activations are ignored. Floats are read
by quant_fp8 and quant_fp4.

Source: `pack_to_int32` and the compressors `pack_quantized`, `naive_quantized` of the library
compressed-tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weights.checkpoint import Entry
from weights.formats import quant_fp4, quant_fp8
from weights.formats.quant_parts import (
    HALVES,
    Cuts,
    Module,
    StoredMatrix,
    checked_zeros,
    cuts_of_scales,
    data_of,
    factors_of,
    group_of_columns,
    groups_of,
    part_of,
    scales_of,
)
from weights.quant import QuantWeight

ENDS = frozenset({
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale",
    "output_zero_point",
})  # fmt: skip


def open_stored(module: Module) -> StoredMatrix:
    """The weight of a module. Raises InputError."""
    name = "weight_packed" if "weight_packed" in module.parts else "weight"
    stored = module.parts.get(name)
    dtype = "" if stored is None else stored.stored_as
    if name == "weight_packed":
        return quant_fp4.open_stored(module) if dtype == "U8" else _packed(module)
    if dtype == "F8_E4M3":
        return quant_fp8.open_stored(module)
    return _plain_integers(module)


def _packed(module: Module) -> StoredMatrix:
    numbers, n, width = module.matrix("weight_packed", ("I32",))
    dims = part_of(module.part("weight_shape", ("I64", "I32"), (2,)), slice(0, 2)).tolist()
    k = dims[1]
    bits = next((b for b in (4, 8) if width * 32 == k * b), 0)
    if dims[0] != n or not bits:
        raise module.error(
            f"{module.name}.weight_packed has shape [{n}, {width}], which is not that of a weight of "
            f"{dims}"
        )
    scales = _scales(module, n)
    groups = scales.shape[1]
    zeros = module.parts.get("weight_zero_point")
    scheme = module.scheme(bits, groups, k, zeros is not None)
    per, middle = 32 // bits, 1 << (bits - 1)
    if zeros is not None:
        module.part("weight_zero_point", ("I32",), (-(-n // per), groups))
    order = module.parts.get("weight_g_idx")
    if order is not None or module.config.reordered:
        module.part("weight_g_idx", ("I32", "I64"), (k,))

    def read(rows: slice, columns: slice) -> QuantWeight:
        across = slice(columns.start // per, columns.stop // per)
        some = groups_of(scheme, columns)
        octets = part_of(numbers, rows, across).contiguous().view(torch.uint8)
        zero = None
        if zeros is not None:
            stored = part_of(zeros, slice(rows.start // per, -(-rows.stop // per)), some)
            zero = _down(stored, bits)[: rows.stop - rows.start]
            zero = checked_zeros(module, scheme, zero, middle)
        scale, offset = scales_of(module, scheme, part_of(scales, rows, some), zero)
        factors = factors_of(scheme, columns, scale, offset)
        return QuantWeight(data_of(octets, bits), scheme.code_name, factors)

    size = scheme.group_size or k
    cuts: dict[str, Cuts] = {
        "weight_packed": ((0, 1), (1, per)),
        "weight_scale": cuts_of_scales(module.parts["weight_scale"].shape, n, 1, size),
        "weight_zero_point": ((0, per), (1, size)),
        "weight_g_idx": ((1, 1),),
    }
    if order is None:
        return StoredMatrix((n, k), scheme, read, cuts, per)
    return StoredMatrix(
        (n, k), scheme, read, cuts, per, group_of_columns(module, "weight_g_idx", groups)
    )


def _down(numbers: Tensor, bits: int) -> Tensor:
    """int32 [m, groups], packed down the rows -> int16 [m * 32 / bits, groups]."""
    octets = numbers.contiguous().view(torch.uint8).unflatten(-1, (numbers.shape[1], 4))
    fine = octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return fine.transpose(1, 2).flatten(0, 1).to(torch.int16)


def _plain_integers(module: Module) -> StoredMatrix:
    numbers, n, k = module.matrix("weight", ("I8",))
    scales = _scales(module, n)
    groups = scales.shape[1]
    zeros = module.parts.get("weight_zero_point")
    scheme = module.scheme(8, groups, k, zeros is not None)
    if zeros is not None:
        zeros = _by_row(module.part("weight_zero_point", ("I8",)), module, "weight_zero_point", n)
        if zeros.shape != scales.shape:
            raise module.error(
                f"{module.name} has zero points of shape {zeros.shape} and scales of shape "
                f"{scales.shape}"
            )

    def read(rows: slice, columns: slice) -> QuantWeight:
        some = groups_of(scheme, columns)
        zero = None
        if zeros is not None:
            zero = part_of(zeros, rows, some).to(torch.int16)
            if not scheme.symmetric:
                zero = zero + 128  # as in pack-quantized
            zero = checked_zeros(module, scheme, zero, 0 if scheme.symmetric else 128)
        scale, offset = scales_of(module, scheme, part_of(scales, rows, some), zero)
        data = part_of(numbers, rows, columns).contiguous()
        return QuantWeight(data, scheme.code_name, factors_of(scheme, columns, scale, offset))

    cuts: dict[str, Cuts] = {"weight": ((0, 1), (1, 1))}
    for end in ("weight_scale", *(("weight_zero_point",) if zeros is not None else ())):
        cuts[end] = cuts_of_scales(module.parts[end].shape, n, 1, scheme.group_size or k)
    return StoredMatrix((n, k), scheme, read, cuts)


def _scales(module: Module, n: int) -> Entry:
    """The scales, [n, groups]."""
    return _by_row(module.part("weight_scale", HALVES), module, "weight_scale", n)


def _by_row(entry: Entry, module: Module, end: str, n: int) -> Entry:
    """`entry` as [n, groups]; it may also be stored as one number for all rows, or one per row."""
    if len(entry.shape) == 2 and entry.shape[0] == n and entry.shape[1]:
        return entry
    if entry.shape not in ((), (1,), (n,)):
        raise module.error(f"{module.name}.{end} has shape {list(entry.shape)} for {n} rows")

    def read(slices: tuple[slice, ...]) -> Tensor:
        whole = entry.read(tuple(slice(0, size) for size in entry.shape)).reshape(-1, 1)
        return whole.expand(n, 1)[slices].clone()

    return Entry((n, 1), entry.stored_as, read, file=entry.file)
