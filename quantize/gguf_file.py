"""Write a GGUF file tensor by tensor, in a given order.

The `gguf` package writes the header. The value types of key-values follow from their Python types, with
the widths that llama.cpp reads: integers have 32 bits, numbers are float32.

What is not here: what the tensors hold (quantize.gguf_run).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from torch import Tensor

from quantize.gguf_pack import BLOCK_BYTES

_ARCHITECTURE = "general.architecture"
_ALIGNMENT = 32
_PLAIN_BYTES = {"F32": 4, "F16": 2}


def num_bytes(form: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor in the file, without padding."""
    if form in _PLAIN_BYTES:
        return _PLAIN_BYTES[form] * prod(shape)
    block, size = BLOCK_BYTES[form]
    return prod(shape) // block * size


def header_bytes(keys: Mapping[str, Any], count: int) -> int:
    """About as many bytes as the header of a file with `count` tensors has, and not fewer."""

    def size(value: Any) -> int:
        if isinstance(value, str):
            return 12 + 4 * len(value)
        return 12 + sum(map(size, value)) if isinstance(value, list) else 12

    return sum(size(key) + size(value) for key, value in keys.items()) + 512 * count


class GgufFile:
    """A file being written. `tensors`: names, forms and shapes, in the order in which `write` is
    called. The file is complete once `finish` has returned."""

    def __init__(
        self, path: Path, keys: Mapping[str, Any], tensors: Sequence[tuple[str, str, tuple[int, ...]]]
    ) -> None:
        self.path = path
        self._left = list(tensors)
        self._writer = GGUFWriter(path, str(keys[_ARCHITECTURE]))
        for key, value in keys.items():
            if key != _ARCHITECTURE:
                self._writer.add_key_value(key, value, *_types(value))
        for name, form, shape in tensors:
            kind = GGMLQuantizationType[form]
            size = num_bytes(form, shape)
            self._writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, name: str, data: Tensor) -> None:
        """Write the next tensor: its bytes, uint8, or its numbers in the form's dtype."""
        expected, form, shape = self._left.pop(0)
        assert name == expected and data.nbytes == num_bytes(form, shape), (name, expected, data.shape)
        self._writer.write_tensor_data(data.contiguous().numpy())

    def finish(self) -> None:
        """Flush everything to the disk."""
        assert not self._left, self._left[0]
        self._writer.close()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _types(value: Any) -> tuple[GGUFValueType, GGUFValueType | None]:
    """The type of a value, and that of an array's elements."""
    if isinstance(value, list):
        assert value, "an empty array has no type"
        first = _types(value[0])[0]
        return GGUFValueType.ARRAY, GGUFValueType.INT32 if first is GGUFValueType.UINT32 else first
    if isinstance(value, bool):
        return GGUFValueType.BOOL, None
    if isinstance(value, int):
        small = GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32
        return (small if abs(value) < 1 << 32 else GGUFValueType.UINT64), None
    if isinstance(value, float):
        return GGUFValueType.FLOAT32, None
    assert isinstance(value, str), type(value)
    return GGUFValueType.STRING, None
