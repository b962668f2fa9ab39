"""The header of a GGUF file: its metadata and the places of its tensors, read without trusting it.

The file is mapped and read once from start to end. Every count and length is compared with the
remaining bytes before it is used. Values are converted on first access, because converting a
vocabulary takes longer than everything else together.

Source: the GGUF specification (`docs/gguf.md` of the ggml project), versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import InputError
from weights.files import damaged
from weights.formats.gguf_names import ARCHITECTURES

FORM = "GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
# A sparse file can be of any length at no cost, so counts have absolute limits too.
_MAX_PAIRS = 1 << 14
_MAX_TENSORS = 1 << 16
_MAX_TEXTS = 1 << 21  # in all arrays of the file; the largest vocabularies have 2^18 tokens, and merges
_MAX_NUMBERS = 1 << 23  # likewise
_MAX_NAME = 1 << 16  # bytes
_MAX_BYTES = 128 << 20  # of the whole header
_MAX_EXPERTS = 1 << 14
_STRING, _ARRAY, _BOOL = 8, 9, 7
# The format's number of a value type -> its numpy code.
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_SMALLEST_PAIR = 8 + 4 + 1  # an empty key, a type, a byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, a type, an offset


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in the header: its dimensions in the file's order (fastest first), the number of its
    type (`kind`), and its offset from the start of the data."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Metadata (converted on access), tensors, and the offset of the data in the file."""

    values: LazyValues
    tensors: tuple[TensorInfo, ...]
    data_start: int


class LazyValues(Mapping[str, Any]):
    """Key-values, each converted on first access. Raises InputError if a value cannot be converted."""

    def __init__(self, path: Path, pending: Mapping[str, Callable[[], Any]]) -> None:
        self._path = path
        self._pending = pending
        self._values: dict[str, Any] = {}

    def plus(self, more: Mapping[str, Callable[[], Any]]) -> LazyValues:
        """These key-values with `more` added."""
        return LazyValues(self._path, {**self._pending, **more})

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            convert = self._pending[key]
            try:
                self._values[key] = convert()
            except ValueError as error:  # strings that are not UTF-8
                raise damaged(self._path, FORM, f"the value of {key!r}: {error}") from error
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._pending

    def __iter__(self) -> Iterator[str]:
        return iter(self._pending)

    def __len__(self) -> int:
        return len(self._pending)


@dataclass
class _Cursor:
    """A place in the mapped file that only moves forward, and never past its end."""

    data: mmap.mmap
    at: int = 0
    texts_left: int = _MAX_TEXTS
    numbers_left: int = _MAX_NUMBERS

    def take(self, size: int, what: str) -> int:
        """Move forward by `size` bytes; returns where they start."""
        start = self.at
        if size > len(self.data) - start:
            raise ValueError(
                f"{what} at byte {start} takes {size} bytes, but only {len(self.data) - start} are left"
            )
        self.at = start + size
        if self.at > _MAX_BYTES:
            raise ValueError(f"its header has more than {_MAX_BYTES >> 20} MiB")
        return start

    def number(self, code: str, what: str) -> int:
        start = self.take(struct.calcsize(code), what)
        return int(struct.unpack_from(code, self.data, start)[0])

    def count(self, smallest: int, what: str, most: int | None = None) -> int:
        """Read a count of items that take at least `smallest` bytes each; `most` is the limit."""
        number = self.number("<Q", what)
        if number * smallest > len(self.data) - self.at:
            raise ValueError(f"it claims {number} {what}, for which the file is too short")
        if most is not None and number > most:
            raise ValueError(f"it claims {number} {what}, more than the limit of {most}")
        return number

    def text(self, what: str) -> str:
        length = self.count(1, f"bytes of {what}", _MAX_NAME)
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8")


def read_header(path: Path) -> Header:
    """Read the header of a file that is not empty. Raises InputError or one of files.DAMAGE."""
    with path.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ValueError(f"it starts with {data[:4]!r}, not with GGUF")
    cursor.take(4, "the magic")
    version = cursor.number("<I", "the version")
    if version == 0:
        raise ValueError("its version is 0")
    if version not in _VERSIONS:
        big = version & 0xFFFF == 0
        raise InputError(
            f"{path} is GGUF {'for big-endian machines' if big else f'of version {version}'}; only "
            "little-endian files of versions 2 and 3 are supported: convert the model again"
        )
    num_tensors = cursor.count(_SMALLEST_TENSOR, "tensors", _MAX_TENSORS)
    num_pairs = cursor.count(_SMALLEST_PAIR, "key-values", _MAX_PAIRS)
    pending: dict[str, Callable[[], Any]] = {}
    for _ in range(num_pairs):
        key = cursor.text("a key")
        if key in pending:
            raise ValueError(f"the key {key!r} occurs twice")
        pending[key] = _value(cursor, cursor.number("<I", "a type"), key)
    values = LazyValues(path, pending)
    names: set[str] = set()
    tensors = []
    for _ in range(num_tensors):
        tensors.append(_tensor(cursor))
        if tensors[-1].name in names:
            raise ValueError(f"the tensor {tensors[-1].name!r} occurs twice")
        names.add(tensors[-1].name)
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 30 or alignment & (alignment - 1):
        raise ValueError(f"it has an alignment of {alignment!r}; it must be a power of two")
    return Header(values, tuple(tensors), -(-cursor.at // alignment) * alignment)


def architecture_of(header: Header, path: Path) -> str:
    """The architecture of the model. Raises InputError if it is not in `ARCHITECTURES`."""
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise InputError(
            f"{path} holds a model of architecture {architecture!r}; supported: "
            + ", ".join(ARCHITECTURES)
        )
    return architecture


def num_experts_of(
    header: Header, path: Path, architecture: str, name: str, shape: tuple[int, ...]
) -> int:
    """How many experts the tensor `name` stacks, from the metadata. Raises InputError if its shape does
    not agree."""
    key = f"{architecture}.expert_count"
    count = header.values.get(key)
    if type(count) is not int or not 1 <= count <= _MAX_EXPERTS:
        raise InputError(f"{path}: {key} must be from 1 to {_MAX_EXPERTS}, not {str(count)[:100]}")
    if len(shape) != 3 or shape[0] != count:
        raise InputError(
            f"{path}: {name!r} has shape {shape}; it must be the matrices of {count} experts, because "
            f"of {key}"
        )
    return count


def _tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.text("a tensor's name")
    num_dims = cursor.number("<I", "a number of dimensions")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(f"the tensor {name!r} has {num_dims} dimensions; 1 to {_MAX_DIMS} are allowed")
    dims = tuple(cursor.number("<Q", f"the shape of {name!r}") for _ in range(num_dims))
    if math.prod(dims) >= 1 << 56:
        raise ValueError(f"the tensor {name!r} has shape {dims}, larger than any weight")
    return TensorInfo(name, dims, cursor.number("<I", "a type"), cursor.number("<Q", "an offset"))


def _value(cursor: _Cursor, kind: int, key: str) -> Callable[[], Any]:
    """Skip a value; returns a function that converts it."""
    data = cursor.data
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind == _STRING:
        length = cursor.count(1, f"bytes of {key!r}")
        start = cursor.take(length, key)
        return lambda: data[start : start + length].decode("utf-8")
    code = _code(kind, key)
    start = cursor.take(np.dtype(code).itemsize, key)
    if kind == _BOOL:
        return lambda: data[start] != 0
    return lambda: np.frombuffer(data, code, 1, start)[0].item()


def _array(cursor: _Cursor, key: str) -> Callable[[], list[Any]]:
    data = cursor.data
    kind = cursor.number("<I", f"the type of {key!r}")
    if kind != _STRING:
        code = _code(kind, key)
        size = np.dtype(code).itemsize
        count = cursor.count(size, f"elements of {key!r}", cursor.numbers_left)
        cursor.numbers_left -= count
        start = cursor.take(count * size, key)
        stored = np.bool_ if kind == _BOOL else code
        return lambda: np.frombuffer(data, code, count, start).astype(stored).tolist()
    count = cursor.count(8, f"texts of {key!r}", cursor.texts_left)
    cursor.texts_left -= count
    start, at, end = cursor.at, cursor.at, len(data)
    # The only loop over a whole vocabulary: unpacking is its only call per string.
    unpack, starts = struct.Struct("<Q").unpack_from, []
    for _ in range(count):
        if at + 8 > end:
            break
        starts.append(at + 8)
        at += 8 + unpack(data, at)[0]
    if at > end or len(starts) < count:
        raise ValueError(f"the {count} texts of {key!r} at byte {start} do not fit the file")
    cursor.take(at - start, f"the texts of {key!r}")

    def convert() -> list[str]:
        stops = [next_start - 8 for next_start in starts[1:]] + [at]
        return [data[i:j].decode("utf-8") for i, j in zip(starts, stops, strict=bool(starts))]

    return convert


def _code(kind: int, key: str) -> str:
    if kind not in _SCALARS:
        what = "an array of arrays" if kind == _ARRAY else f"of type {kind}"
        raise ValueError(f"the value of {key!r} is {what}, which is not supported")
    return _SCALARS[kind]
