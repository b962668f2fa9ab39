"""Write safetensors in pieces: the header first, from shapes alone, then each tensor at its offset.

safetensors' own `save_file` needs all tensors of a file in memory at once. Here the offset of every
tensor is known before its data, so several threads can write pieces as they are read, and only one
piece per thread is in memory. A digest of each tensor is computed while it is written.

The format: eight bytes with the length of the header (little-endian), a JSON header padded with spaces
to a multiple of eight bytes, and the data without gaps. Tensors with larger elements come first, so
that all are aligned.

What is not here: reading (`weights.formats.safetensors_io`, `weights.formats.yoke_io`), and which
tensors go into which file.
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

# The dtypes that can be written, in safetensors' spelling: the same as can be read.
DTYPES: dict[str, torch.dtype] = {name: dtype for name, (_, dtype) in mapped.DTYPES.items()}
# The fastest digest of the standard library on processors with SHA instructions (1.2 GB/s against 0.9
# for BLAKE2b). Hashing is most of the computation of resharding.
DIGEST = "sha256"
START_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "sync_file_range"):
    _libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@dataclass(frozen=True)
class Tensors:
    """The content of one file: `shapes` maps names to (dtype in safetensors' spelling, shape), in any
    order."""

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
    """The header as a JSON object: dtype, shape and offsets of every tensor."""
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
    """The bytes of a file before its data: the header's length and the header."""
    text = json.dumps(header_of(tensors), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def start_writing(descriptor: int, offset: int, size: int) -> None:
    """Start writing a part of a file to the disk, without waiting for it. Otherwise the disk idles
    until the final fsync, and then all threads wait for it. This is only a hint to the kernel."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


class SafetensorsFile:
    """A file being written: `write` writes one whole tensor at its offset, from pieces in order.

    Threads may write different tensors at the same time. The file is valid once `finish` has returned.
    Until then the length of the header is zero, which no reader accepts, so an unfinished file cannot
    be mistaken for a valid one that contains zeros. Without `digests` no digests are computed.
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
        """Write a tensor from contiguous `pieces`, which together must be exactly the tensor. Returns
        its digest in hex (that of no data without `digests`). `done` is called with the bytes of each
        piece."""
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
        """Flush the data to the disk, then write the header's length, which makes the file valid."""
        try:
            os.fsync(self._fd)
            self._pwrite(self._first[:8], 0)
            os.fsync(self._fd)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file as it is. Does nothing after `finish`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            # Linux writes at most 2 GiB per call, and may write less.
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
