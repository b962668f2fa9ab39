"""Safetensors, as one file or as Hugging Face's sharded folder with an index.

The header (weights.formats.safetensors_header) is checked against the file before an entry is made:
lengths, dtypes, shapes, offsets, overlaps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.checkpoint import Checkpoint, Entry
from weights.files import DAMAGE, check_overlaps, damaged
from weights.files import read_json as read_json
from weights.formats.folder import assemble, gather
from weights.formats.safetensors_header import FORM, read_header
from weights.locate import Source
from weights.mapped import check_shape, item_size, map_file, plain_entry
from weights.names import translate, untranslated


def open_safetensors(source: Source, translated: bool = True) -> Checkpoint:
    """Open `.safetensors` files with the `config.json` beside them. Without `translated`, entries keep
    the stored names and the stored order of rows. Raises InputError."""
    stored, absent = gather(source, stored_entries)
    return assemble(source, stored, absent, translate if translated else untranslated)


def stored_entries(file: Path) -> dict[str, Entry]:
    """The tensors of one file, by stored name. Raises InputError."""
    try:
        header, data_start, size = read_header(file)
        data = map_file(file)
        entries, ranges = {}, []
        for name, about in header.items():
            dtype, shape, start, stop = _described(name, about)
            count = math.prod(shape)
            if stop - start != count * item_size(dtype):
                raise ValueError(f"{name!r} has {stop - start} bytes for shape {shape} of {dtype}")
            entries[name] = plain_entry(name, data, data_start + start, count, dtype, shape)
            ranges.append((start, stop, name))
        check_overlaps(ranges)
        end = data_start + max((stop for _, stop, _ in ranges), default=0)
        if end != size:
            raise ValueError(f"its tensors end at byte {end} of {size}")
        return entries
    except InputError:
        raise
    except DAMAGE as error:
        raise damaged(file, FORM, error) from error


def _described(name: str, about: Any) -> tuple[str, tuple[int, ...], int, int]:
    """The dtype, the shape and the byte range (start, stop) of a tensor in the header. Raises
    ValueError."""
    if not isinstance(about, dict):
        raise ValueError(f"{name!r} is described by {type(about).__name__}, not by an object")
    dtype, shape, offsets = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"{name!r} lacks one of dtype, shape and data_offsets")
    whole = all(type(offset) is int for offset in offsets)
    if len(offsets) != 2 or not whole or not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"{name!r} has offsets {str(offsets)[:100]}")
    return dtype, check_shape(shape), offsets[0], offsets[1]
