"""GGUF files (the format of llama.cpp), memory-mapped and lazy. A slice is read still quantized, or is
dequantized when it is read (weights.formats.gguf_blocks).

weights.formats.gguf_header reads the header. Block formats that have no row in gguf_blocks.FORMS are
only dequantized, by the `gguf` package. Changes by llama.cpp's converter are undone: it
reverses dimensions, stacks experts, reorders the rows of some architectures' query and key projections
for interleaved rotary embeddings, and adds 1 to Gemma's norms (`weights.formats.gguf_names`). Tensors
that are settings, not weights, become values of `config`, under their names: the factors by which
rotary frequencies are divided.

A model may be split into several files (weights.formats.gguf_split).

Source: the GGUF specification, and llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from base.errors import InputError
from weights.checkpoint import Checkpoint, Entry, Slices, check_slices
from weights.files import DAMAGE, check_overlaps, damaged
from weights.formats.gguf_blocks import (
    FORMS,
    reader_of_blocks,
    reader_of_stacked_blocks,
    values_of_blocks,
)
from weights.formats.gguf_header import (
    FORM,
    Header,
    TensorInfo,
    architecture_of,
    num_experts_of,
)
from weights.formats.gguf_names import (
    FACTORS,
    naming_of,
    same_for_all_layers,
    translate_gguf,
)
from weights.formats.gguf_split import read_parts
from weights.locate import Source
from weights.mapped import Bytes, map_file, plain_entry
from weights.names import CanonicalPart
from weights.schemes import GGUF_SCHEMES
from weights.views import present

_MAX_FACTORS = 1 << 12  # one factor per pair of a head's elements; a longer list is rejected
_PLAIN = ("F64", "F32", "F16", "BF16")  # plain numbers; all other types are stored in blocks


def open_gguf(source: Source) -> Checkpoint:
    """Open a GGUF model of one of `gguf_names.ARCHITECTURES`, in one file or several. Raises
    InputError."""
    path = source.path
    try:
        headers = read_parts(source.files)
        header = headers[0]
        architecture = architecture_of(header, path)
        stored: dict[str, Entry] = {}
        for file, part in zip(source.files, headers, strict=True):
            stored |= _stored_entries(file, part)
        factors = {name: _factors(path, name, stored.pop(name)) for name in FACTORS if name in stored}
        config = header.values.plus(factors)
        naming = naming_of(architecture, stored)

        def canonical(name: str) -> tuple[CanonicalPart, ...]:
            num_experts = 0
            if "_exps." in name:
                num_experts = num_experts_of(header, path, architecture, name, stored[name].shape)
            pieces = translate_gguf(name, naming, num_experts)
            if not pieces:
                raise InputError(
                    f"{path} holds a tensor {name!r} that Yoke does not know for this architecture"
                )
            return pieces

        def heads() -> tuple[int, int]:
            return _heads(path, config, f"{architecture}.attention.")

        return present(source, stored, canonical, config, heads)
    except InputError:
        raise
    except DAMAGE as error:
        raise damaged(path, FORM, error) from error


def _factors(path: Path, name: str, entry: Entry) -> Callable[[], list[float]]:
    """A function that reads the factors of rotary frequencies. Raises InputError for a wrong shape."""
    if len(entry.shape) != 1 or entry.shape[0] > _MAX_FACTORS:
        raise InputError(f"{path}: {name!r} has shape {entry.shape}; it must be a list of factors")

    def values() -> list[float]:
        found: list[float] = entry.read((slice(0, entry.shape[0]),)).tolist()
        return found

    return values


def _heads(path: Path, config: Mapping[str, Any], prefix: str) -> tuple[int, int]:
    num_q = same_for_all_layers(config, prefix + "head_count", path)
    num_kv = same_for_all_layers(config, prefix + "head_count_kv", path)
    num_kv = num_q if num_kv is None else num_kv
    for value in (num_q, num_kv):
        if type(value) is not int or not 1 <= value < 1 << 20:
            raise InputError(
                f"{path}: {prefix}head_count and head_count_kv must be positive integers, not "
                f"{str(num_q)[:100]} and {str(num_kv)[:100]}"
            )
    return num_q, num_kv


def _stored_entries(path: Path, header: Header) -> dict[str, Entry]:
    """The tensors of one file under GGUF's names. Raises InputError."""
    try:
        return {name: replace(entry, file=path) for name, entry in _checked(path, header).items()}
    except InputError:
        raise
    except DAMAGE as error:
        raise damaged(path, FORM, error) from error


def _checked(path: Path, header: Header) -> dict[str, Entry]:
    """As `_stored_entries`, but without `file`. Raises InputError or one of files.DAMAGE."""
    size, data = path.stat().st_size, map_file(path)
    entries, ranges = {}, []
    for info in header.tensors:
        start = header.data_start + info.offset
        kind = _kind(path, info)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if info.dims[0] % block:
            raise ValueError(
                f"{info.name!r} has rows of {info.dims[0]}, not of whole {kind.name} blocks"
            )
        stop = start + math.prod(info.dims) // block * block_bytes
        if stop > size:
            raise ValueError(f"{info.name!r} ends at byte {stop} of {size}")
        ranges.append((start, stop, info.name))
        shape = tuple(reversed(info.dims))
        if kind.name in _PLAIN:
            entries[info.name] = plain_entry(info.name, data, start, math.prod(shape), kind.name, shape)
        else:
            entries[info.name] = _blocks_entry(path, info.name, data[start:stop], kind, shape)
    check_overlaps(ranges)
    return entries


def _kind(path: Path, info: TensorInfo) -> GGMLQuantizationType:
    """The type of a tensor. Raises InputError if it cannot be read."""
    known = info.kind in GGMLQuantizationType._value2member_map_
    kind = GGMLQuantizationType(info.kind) if known else None
    if kind is None or not _readable(kind):
        raise InputError(
            f"{path}: {info.name!r} is stored as {kind.name if kind else f'type {info.kind}'}, which "
            "the installed gguf package cannot dequantize; use another quantization of the model, or "
            "install a newer gguf package"
        )
    return kind


@functools.cache
def _readable(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package can dequantize a type: one block of zeros is tried."""
    if kind.name in _PLAIN or kind.name in FORMS:
        return True
    if kind not in GGML_QUANT_SIZES:
        return False
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _blocks_entry(
    path: Path, name: str, data: Bytes, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> Entry:
    """A tensor whose rows are stored as blocks along the last dimension."""
    where = f"{path}: {name!r}"
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = data.reshape(*shape[:-1], shape[-1] // block * block_bytes)

    def part_of(slices: Slices, first: int, last: int) -> Tensor:
        """Blocks [first, last) of rows, as a view of the file."""
        return torch.from_numpy(rows[(*slices[:-1], slice(first * block_bytes, last * block_bytes))])

    def read(slices: Slices) -> Tensor:
        check_slices(name, shape, slices)
        sizes = [part.stop - part.start for part in slices]
        if 0 in sizes:
            return torch.empty(sizes)
        columns = slices[-1]
        first, last = columns.start // block, -(-columns.stop // block)
        values = values_of_blocks(part_of(slices, first, last), kind.name, where)
        return values[..., columns.start - first * block : columns.stop - first * block].contiguous()

    def peek_raw(slices: Slices) -> Tensor:
        check_slices(name, shape, slices)
        columns = slices[-1]
        assert columns.start % block == 0 and columns.stop % block == 0, (name, columns, block)
        return part_of(slices, columns.start // block, columns.stop // block)

    def read_raw(slices: Slices) -> Tensor:
        return peek_raw(slices).clone(memory_format=torch.contiguous_format)

    quant = reader_of_blocks(kind.name, shape, peek_raw, where)
    quant_of = reader_of_stacked_blocks(kind.name, shape, peek_raw, where)
    scheme = None if quant is None and quant_of is None else GGUF_SCHEMES[kind.name]
    return Entry(shape, kind.name, read, block, read_raw, scheme=scheme, quant=quant, quant_of=quant_of)
