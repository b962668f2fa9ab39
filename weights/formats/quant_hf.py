"""Hugging Face checkpoints with quantized weights: the stored tensors of a module become one weight.

`config.json` declares the method (weights.formats.quant_config), and one reader per layout knows where
the bits are (weights.formats.quant_compressed, quant_gptq, quant_awq, quant_fp8, quant_fp4,
quant_modelopt, quant_mxfp4). A module `x` becomes the entry `x.weight`, which can be read quantized or
dequantized; stacked experts become an entry for each matrix; plain tensors stay as they are. Config and
tensors must agree.

If columns were quantized in another order than they are stored in (act-order), the columns of a group
are scattered over the row: such weights can only be dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from base.errors import InputError
from weights.checkpoint import Entry, Slices, check_slices
from weights.formats import (
    quant_awq,
    quant_compressed,
    quant_fp8,
    quant_gptq,
    quant_modelopt,
    quant_mxfp4,
)
from weights.formats.quant_config import MARKS, read_quant_config
from weights.formats.quant_parts import Module, StoredMatrix, stored_parts
from weights.quant import QuantWeight

Opened = Mapping[str, StoredMatrix | Entry]


def _one(open_stored: Callable[[Module], StoredMatrix]) -> Callable[[Module], Opened]:
    """A reader of modules that have one weight."""
    return lambda module: {f"{module.name}.weight": open_stored(module)}


# By method: the tensors that its modules have, by the last components of their names, and the reader.
_WAYS: dict[str, tuple[frozenset[str], Callable[[Module], Opened]]] = {
    "compressed-tensors": (quant_compressed.ENDS, _one(quant_compressed.open_stored)),
    "gptq": (quant_gptq.ENDS, _one(quant_gptq.open_stored)),
    "awq": (quant_awq.ENDS, _one(quant_awq.open_stored)),
    "fp8": (quant_fp8.ENDS, _one(quant_fp8.open_stored)),
    "fbgemm_fp8": (quant_fp8.ENDS, _one(quant_fp8.open_stored)),
    "modelopt": (quant_modelopt.ENDS, _one(quant_modelopt.open_stored)),
    "mxfp4": (quant_mxfp4.ENDS, quant_mxfp4.open_experts),
}
_PACKED = frozenset({"qweight", "weight_packed"})  # parts that are the weight


def with_quantized(
    stored: Mapping[str, Entry], config: Mapping[str, Any], source: str, absent: Mapping[str, str]
) -> Mapping[str, Entry]:
    """`stored` with one entry in place of the tensors of each quantized module. `source` is the file of
    the config; `absent` maps tensors that are missing to the reasons. Raises InputError."""
    declared = read_quant_config(config, source)
    if declared is None:
        odd = next((name for name in stored if name.endswith(MARKS)), None)
        if odd is not None:
            raise InputError(
                f"{source} has no quantization_config, but the weights are quantized ({odd!r}); use "
                "the config.json that belongs to them"
            )
        return stored
    ends, open_stored = _WAYS[declared.method]
    found: dict[str, dict[str, Entry]] = {}
    plain = dict(stored)
    for name in stored:
        module_name, _, end = name.rpartition(".")
        if end in ends:
            found.setdefault(module_name, {})[end] = plain.pop(name)
    for name, parts in found.items():
        weight = plain.pop(f"{name}.weight", None)
        module = Module(name, parts, declared, absent)
        if name in declared.ignored:
            raise module.error(f"{name} is stored quantized, although the config excludes it")
        if weight is not None and _PACKED & parts.keys():
            raise module.error(f"{name} is stored twice, quantized and as {name}.weight")
        if weight is not None:
            parts["weight"] = weight
        for weight_name, opened in open_stored(module).items():
            plain[weight_name] = opened if isinstance(opened, Entry) else _entry(module, opened)
    for name, entry in plain.items():
        if entry.stored_as == "F8_E4M3":
            raise Module(name, {}, declared).error(f"{name} is stored as F8_E4M3 without scales")
    return plain


def _entry(module: Module, stored: StoredMatrix) -> Entry:
    """A weight of a module. Its parts may be in several files; `file` is that of the first."""
    n, k = stored.shape
    unit = stored.scheme.unit

    def covering(rows: slice, columns: slice) -> tuple[QuantWeight, int, int]:
        """A weight that contains these rows and columns, and the offsets of both in it."""
        top, left = rows.start // stored.row_unit * stored.row_unit, columns.start // unit * unit
        bottom = min(-(-rows.stop // stored.row_unit) * stored.row_unit, n)
        right = min(-(-columns.stop // unit) * unit, k)
        whole = stored.read(slice(top, bottom), slice(left, right))
        return whole, rows.start - top, columns.start - left

    def quant(rows: slice, columns: slice) -> QuantWeight:
        whole, top, left = covering(rows, columns)
        whole = whole.rows(top, top + rows.stop - rows.start)
        return whole.columns(left, left + columns.stop - columns.start)

    def read(slices: Slices) -> Tensor:
        check_slices(module.name, stored.shape, slices)
        rows, columns = slices
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not height or not width:
            return torch.empty(height, width)
        if stored.order is not None:
            values, top = _reordered(stored, rows)
            return values[top : top + height, columns].contiguous()
        whole, top, left = covering(rows, columns)
        return whole.rows(top, top + height).dequantize()[:, left : left + width].contiguous()

    def _reordered(stored: StoredMatrix, rows: slice) -> tuple[Tensor, int]:
        assert stored.order is not None
        whole, top, _ = covering(rows, slice(0, k))
        order = stored.order()
        scale = whole.scale.float()[:, order]
        values = whole.values() * scale
        return (values if whole.offset is None else values + whole.offset.float()[:, order]), top

    kept = stored.order is None
    file = next(iter(module.parts.values())).file
    name = f"{module.config.method} {stored.scheme.name}{'' if kept else ', act-order'}"
    return Entry(
        stored.shape, name, read, file=file, scheme=stored.scheme if kept else None,
        quant=quant if kept else None,
        stored_in=stored.stored_in or (lambda slices: stored_parts(module, stored.cuts, slices)),
    )  # fmt: skip
