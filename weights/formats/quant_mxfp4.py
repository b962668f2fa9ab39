"""The layout of gpt-oss: the experts of a layer are stacked, in MXFP4.

`gate_up_proj_blocks` uint8 [experts, rows, k / 32, 16]: 32 numbers (E2M1), two a byte, the first in its
lower half. `gate_up_proj_scales` uint8 [experts, rows, k / 32]: powers of two, as their exponents.
Rows alternate between gate and up. `down_proj_blocks` and `down_proj_scales` are the same, of one
matrix. Biases are plain: `gate_up_proj_bias` [experts, rows]. Each matrix of each expert becomes an
entry of its own.

Source: `convert_moe_packed_tensors` and `GptOssExperts` of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weights.checkpoint import Entry, Slices, check_slices
from weights.formats.quant_layouts import EXPERTS, expert_names
from weights.formats.quant_parts import (
    POWERS,
    Module,
    StoredMatrix,
    check_e8m0,
    factors_of,
    groups_of,
    part_of,
)
from weights.quant import QuantWeight, unpack_nibbles
from weights.schemes import MXFP4

ENDS = frozenset(f"{stack}_{end}" for stack in EXPERTS for end in ("blocks", "scales", "bias"))
_SIZE = MXFP4.group_size


def open_experts(module: Module) -> dict[str, StoredMatrix | Entry]:
    """The weights and biases of a layer's experts, by canonical name. Raises InputError."""
    found: dict[str, StoredMatrix | Entry] = {}
    for stack, matrices in EXPERTS.items():
        blocks = module.part(f"{stack}_blocks", ("U8",))
        if len(blocks.shape) != 4 or 0 in blocks.shape or blocks.shape[3] != _SIZE // 2:
            raise module.error(
                f"{module.name}.{stack}_blocks has shape {list(blocks.shape)}, and must be [experts, "
                f"rows, blocks, {_SIZE // 2}]"
            )
        count, rows = blocks.shape[:2]
        if rows % len(matrices):
            raise module.error(f"{module.name}.{stack}_blocks has {rows} rows, an odd number")
        module.part(f"{stack}_scales", POWERS, blocks.shape[:3])
        for expert, first, name in expert_names(module.name, stack, count, "weight"):
            found[name] = _matrix(module, stack, expert, slice(first, None, len(matrices)))
        if f"{stack}_bias" in module.parts:
            module.part(f"{stack}_bias", ("BF16", "F16", "F32"), (count, rows))
            for expert, first, name in expert_names(module.name, stack, count, "bias"):
                found[name] = _bias(module, stack, expert, slice(first, None, len(matrices)))
    return found


def _matrix(module: Module, stack: str, expert: int, own: slice) -> StoredMatrix:
    """The matrix of the rows `own` (every one, or every second) of one expert."""
    blocks, scales = (module.parts[f"{stack}_{end}"] for end in ("blocks", "scales"))
    shape = (blocks.shape[1] // own.step, blocks.shape[2] * _SIZE)

    def within(rows: slice, columns: slice) -> Slices:
        """Where the stack has these rows, among others, and the groups of these columns."""
        stored = slice(rows.start * own.step, rows.stop * own.step)
        return slice(expert, expert + 1), stored, groups_of(MXFP4, columns)

    def read(rows: slice, columns: slice) -> QuantWeight:
        where = within(rows, columns)
        octets = part_of(blocks, *where, slice(0, _SIZE // 2))[0, own].flatten(1)
        powers = part_of(scales, *where)[0, own].contiguous().view(torch.uint8)
        check_e8m0(module, f"{stack}_scales", powers)
        return QuantWeight(unpack_nibbles(octets), "e2m1", factors_of(MXFP4, columns, powers))

    def stored_in(slices: Slices) -> list[tuple[str, Slices]]:
        rows, columns = slices
        if rows.start == rows.stop or columns.start == columns.stop:
            return []
        where = within(rows, columns)
        whole = (*where, slice(0, _SIZE // 2))
        name = f"{module.name}.{stack}"
        return [(f"{name}_blocks", whole), (f"{name}_scales", where)]

    return StoredMatrix(shape, MXFP4, read, {}, stored_in=stored_in)


def _bias(module: Module, stack: str, expert: int, own: slice) -> Entry:
    entry = module.parts[f"{stack}_bias"]
    shape = (entry.shape[1] // own.step,)

    def within(slices: Slices) -> Slices:
        check_slices(f"{module.name}.{stack}_bias", shape, slices)
        (rows,) = slices
        return slice(expert, expert + 1), slice(rows.start * own.step, rows.stop * own.step)

    def read(slices: Slices) -> Tensor:
        return part_of(entry, *within(slices))[0, own].clone()

    def stored_in(slices: Slices) -> list[tuple[str, Slices]]:
        return [(f"{module.name}.{stack}_bias", within(slices))]

    return Entry(shape, entry.stored_as, read, file=entry.file, stored_in=stored_in)
