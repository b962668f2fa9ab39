"""Read a folder that was written here as a checkpoint of float32 weights, to measure what is on the
disk.

What is not here: the reader of a run, which keeps weights quantized (weights.formats.quant_hf).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantize.plan import Plan
from weights.checkpoint import Checkpoint, Entry, Slices
from weights.formats.safetensors_io import stored_entries
from weights.quant import QuantWeight, integer_weight, unpack_nibbles
from weights.schemes import Scheme


def read_back(plan: Plan, folder: Path) -> Checkpoint:
    """The plan's checkpoint, with the weights that were written into `folder`."""
    stored: dict[str, Entry] = {}
    for file in plan.files:
        stored |= stored_entries(folder / file)
    entries = {
        name: _dequantized(name, stored, shape, plan.schemes[name])
        if name in plan.schemes
        else stored[name]
        for name, shape in plan.shapes.items()
    }
    files = tuple(folder / file for file in plan.files)
    return replace(
        plan.checkpoint, path=folder, beside=folder, entries=entries, stored_names={}, files=files
    )


def read_weight(name: str, stored: dict[str, Entry], scheme: Scheme) -> QuantWeight:
    """One weight, from the tensors that `quantize.compressed.stored_tensors` made."""

    def tensor(suffix: str) -> Tensor:
        entry = stored[name + suffix]
        return entry.read(tuple(slice(0, size) for size in entry.shape))

    scale = tensor("_scale")
    if scheme.bits == 8:
        data = tensor("")
        return integer_weight(data, scale, None, 8, data.shape[1])
    data = unpack_nibbles(tensor("_packed").view(torch.uint8))
    offset = None
    if not scheme.symmetric:
        packed = tensor("_zero_point")
        zero = torch.stack([packed >> shift & 15 for shift in range(0, 32, 4)], dim=1).flatten(0, 1)
        offset = -zero[: len(data)] * scale.float()
    return integer_weight(data, scale, offset, 4, scheme.group_size)


def _dequantized(name: str, stored: dict[str, Entry], shape: tuple[int, ...], scheme: Scheme) -> Entry:
    def read(slices: Slices) -> Tensor:
        return read_weight(name, stored, scheme).dequantize()[slices]

    return Entry(shape, scheme.name, read)
