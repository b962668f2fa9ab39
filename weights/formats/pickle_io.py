"""PyTorch's own files (`.pth`, `.bin`, `.pt`): zip archives, memory-mapped; no code in them is run.

Since torch 1.6 such a file is a zip archive of uncompressed records: `data.pkl` describes the tensors,
`data/<key>` holds a storage's bytes. First the archive is checked against the file. Then
weights.formats.pickle_program interprets the pickle, and tensors are read from the mapped file, slice
by slice.

What is not here: older files (several pickles in a row), TorchScript, big-endian files. Each has an
error message of its own.

Source: `torch/serialization.py`, and the description of zip archives (PKWARE's APPNOTE).
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.checkpoint import Checkpoint, Entry
from weights.files import DAMAGE, check_overlaps, damaged, regular_file
from weights.formats.folder import assemble, gather
from weights.formats.pickle_program import LEGACY_HINT, CodeError, PickledTensor, read_program
from weights.locate import Source
from weights.mapped import check_shape, item_size, map_file, plain_entry

_FORM = "a PyTorch file"
_PROGRAM_LIMIT = 16 << 20  # bytes; usual are 200 per tensor
_WRAPPERS = ("state_dict", "model", "module")  # keys under which trainers put the weights
_LOCAL_HEADER = 30


def open_pickle(source: Source) -> Checkpoint:
    """Open PyTorch files with the `config.json` beside them. Raises InputError."""
    return assemble(source, *gather(source, stored_entries))


def stored_entries(file: Path) -> dict[str, Entry]:
    """The tensors of one file, by stored name. Raises InputError."""
    size = regular_file(file, _FORM)
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
        if start[:2] != b"PK":
            raise _not_an_archive(file, start)
        records = _records(file, size)
        prefix, (offset, length) = _program(records)
        if length > _PROGRAM_LIMIT:
            raise ValueError(f"its pickle has {length} bytes, more than any checkpoint needs")
        data = map_file(file)
        order, _ = records.get(prefix + "byteorder", (0, 0))
        if order and data[order : order + 3].tobytes() == b"big":
            raise InputError(f"{file} was written on a big-endian machine; save it again on this one")
        described = read_program(data[offset : offset + length].tobytes())
        return {
            name: _entry(name, tensor, data, records, prefix)
            for name, tensor in _state_dict(described).items()
        }
    except CodeError as error:
        raise InputError(
            f"{file} contains code, not only weights: {error}. Yoke does not execute it: get the model "
            "as safetensors"
        ) from error
    except InputError:
        raise
    except (*DAMAGE, zipfile.BadZipFile) as error:
        raise damaged(file, _FORM, error) from error


def _not_an_archive(file: Path, start: bytes) -> InputError:
    if start[:1] == b"\x80" or start[:2] == b"(d":
        return InputError(
            f"{file} is a pickle from before torch 1.6, which cannot be read in parts; {LEGACY_HINT}"
        )
    if start.startswith(b"vers"):
        return InputError(f"{file} is a Git LFS pointer, not the file itself; run: git lfs pull")
    return damaged(file, _FORM, f"it starts with {start!r}, not with PK")


def _records(file: Path, size: int) -> dict[str, tuple[int, int]]:
    """Offset and length of each record. Raises an Exception if the archive is damaged, inconsistent,
    compressed or encrypted."""
    records: dict[str, tuple[int, int]] = {}
    ranges = []
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        for info in archive.infolist():
            if info.filename in records:
                raise ValueError(f"the record {info.filename!r} occurs twice")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError(f"the record {info.filename!r} is compressed; torch never does that")
            if info.flag_bits & 1:
                raise ValueError(f"the record {info.filename!r} is encrypted")
            # The record follows a local header, and only that header has its own length.
            opened.seek(info.header_offset)
            header = opened.read(_LOCAL_HEADER)
            if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
                raise ValueError(f"the record {info.filename!r} is not where it should be")
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            if opened.read(name_length) != info.orig_filename.encode():
                raise ValueError(f"the record {info.filename!r} has two names")
            offset = info.header_offset + _LOCAL_HEADER + name_length + extra_length
            if offset + info.file_size > size:
                raise ValueError(f"the record {info.filename!r} is outside the file")
            records[info.filename] = (offset, info.file_size)
            ranges.append((info.header_offset, offset + info.file_size, info.filename))
    check_overlaps(ranges)
    return records


def _program(records: dict[str, tuple[int, int]]) -> tuple[str, tuple[int, int]]:
    """The archive's top folder, and where its `data.pkl` lies."""
    found = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError(f"its archive has {len(found)} files data.pkl, not one")
    prefix = found[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in records:
        raise CodeError("it is a TorchScript program")
    return prefix, records[found[0]]


def _state_dict(described: Any) -> dict[str, PickledTensor]:
    """The tensors by name, without the dicts that some trainers wrap around them."""
    for key in _WRAPPERS:
        if isinstance(described, dict) and isinstance(described.get(key), dict):
            described = described[key]
    if not isinstance(described, dict):
        raise ValueError(f"it holds {type(described).__name__}, not a dict of tensors")
    for name, value in described.items():
        if not isinstance(name, str) or not isinstance(value, PickledTensor):
            raise ValueError(f"{name!r} is of type {type(value).__name__}, not a tensor")
    return described


def _entry(
    name: str, tensor: PickledTensor, data: Any, records: dict[str, tuple[int, int]], prefix: str
) -> Entry:
    storage = tensor.storage
    size = item_size(tensor.dtype)
    held = storage.count * (1 if storage.dtype is None else size)
    offset, length = records[f"{prefix}data/{storage.key}"]
    if held > length:
        raise ValueError(f"{name!r} needs {held} bytes of a record of {length}")
    if type(tensor.shape) is not tuple or type(tensor.strides) is not tuple:
        raise ValueError(f"{name!r} has no valid shape and strides")
    shape, strides, start = check_shape(tensor.shape), tensor.strides, tensor.offset
    whole = all(type(number) is int for number in (start, *strides))
    if not whole or len(strides) != len(shape) or start < 0 or start * size > held:
        raise ValueError(f"{name!r} is outside its storage")
    return plain_entry(
        name, data, offset + start * size, held // size - start, tensor.dtype, shape, strides
    )
