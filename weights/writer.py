"""Writing safetensors in pieces: the header first, from shapes alone, then each tensor at its offset.

safetensors' own `save_file` wants all tensors of a file in memory at once. Here the place of every
tensor is known before a byte of it is, so pieces can be written as they are read, by several threads,
and no more than a piece per thread is ever held. What is written is checksummed on its way.

The format: eight bytes with the length of the header (little-endian), a JSON header padded with spaces
to eight bytes, and the data, back to back. Tensors of wide elements come first, so all are aligned.

What is not here: reading (safetensors does that, or `weights.formats.yoke_io`), and which tensors go
where.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights import mapped

# The dtypes that are written: those that are read, in safetensors' spelling.
DTYPES: dict[str, torch.dtype] = {name: dtype for name, (_, dtype) in mapped.DTYPES.items()}
# Of the digests in the standard library the fastest where processors have SHA instructions (1.2 GB/s
# against 0.9 for BLAKE2b); hashing is most of what resharding computes.
DIGEST = "sha256"
START_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "sync_file_range"):
    _libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@dataclass(frozen=True)
class Tensors:
    """What one file holds: names to (dtype in safetensors' spelling, shape), in any order."""

    shapes: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        return sum(num_bytes(dtype, shape) for dtype, shape in self.shapes.values())

    @property
    def file_bytes(self) -> int:
        return len(header_bytes(self)) + self.data_bytes


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPES[dtype].itemsize


def header_of(tensors: Tensors) -> dict[str, Any]:
    """The header as an object: dtype, shape and place of every tensor."""
    header: dict[str, Any] = {}
    if tensors.metadata:
        header["__metadata__"] = dict(tensors.metadata)
    offset = 0
    for name in sorted(tensors.shapes, key=lambda name: -DTYPES[tensors.shapes[name][0]].itemsize):
        dtype, shape = tensors.shapes[name]
        end = offset + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header


def header_bytes(tensors: Tensors) -> bytes:
    """What a file begins with, up to its data."""
    text = json.dumps(header_of(tensors), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def start_writing(descriptor: int, offset: int, size: int) -> None:
    """Let the disk begin with a part of a file, without waiting for it: else it idles until the end,
    and then all wait for it. Nothing depends on it."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


class SafetensorsFile:
    """A file being written: `write` puts one whole tensor at its place, from pieces in order.

    Threads may write different tensors at the same time. Usable once `finish` has returned: until then
    the length of the header is zero, which no reader accepts, so that a file that was not finished
    cannot be taken for one with zeros in it. Without `digests` none are computed.
    """

    def __init__(self, path: Path, tensors: Tensors, digests: bool = True) -> None:
        self.path = path
        self._digests = digests
        self._header = header_of(tensors)
        self._first = header_bytes(tensors)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._pwrite(b"\0" * 8 + self._first[8:], 0)

    def write(
        self, name: str, pieces: Iterable[Tensor], done: Callable[[int], None] = lambda size: None
    ) -> str:
        """Write a tensor from contiguous `pieces`, which together are exactly it; its digest."""
        first, last = self._header[name]["data_offsets"]
        digest = hashlib.new(DIGEST, usedforsecurity=False)
        position = started = first
        for piece in pieces:
            data = memory_of(piece)
            assert position + len(data) <= last, (name, position, len(data), last)
            self._pwrite(data, len(self._first) + position)
            if self._digests:
                digest.update(data)
            position += len(data)
            if position - started >= START_BYTES or position == last:
                start_writing(self._fd, len(self._first) + started, position - started)
                started = position
            done(len(data))
        assert position == last, (name, position, last)
        return digest.hexdigest()

    def finish(self) -> None:
        """Everything to the disk, then the header's length, which makes it a file to be read."""
        try:
            os.fsync(self._fd)
            self._pwrite(self._first[:8], 0)
            os.fsync(self._fd)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file as it is. Harmless after `finish`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            # Linux writes at most 2 GiB in a call, and may write less.
            count = os.pwrite(self._fd, view[: 1 << 30], offset)
            view, offset = view[count:], offset + count


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def digest_of(pieces: Iterator[Tensor]) -> str:
    digest = hashlib.new(DIGEST, usedforsecurity=False)
    for piece in pieces:
        digest.update(memory_of(piece))
    return digest.hexdigest()
