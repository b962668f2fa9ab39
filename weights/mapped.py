"""Tensors stored in a file as plain numbers: memory-mapped, and copied slice by slice.

Safetensors, PyTorch's archives and GGUF's unquantized tensors all use this module. The file is mapped
once, read-only; only the part being read is resident, and a slice is a copy that does not refer to the
file. Offsets, sizes and strides are checked against the file when an entry is made.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weights.checkpoint import Entry, Slices, check_slices
from weights.schemes import is_plain

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# By the dtype in safetensors' spelling: the numpy dtype of the mapping and the torch dtype of the
# result. numpy has neither bfloat16 nor 8-bit floats; they are mapped as integers of the same size.
DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "F64": ("<f8", torch.float64),
    "F32": ("<f4", torch.float32),
    "F16": ("<f2", torch.float16),
    "BF16": ("<i2", torch.bfloat16),
    "F8_E4M3": ("u1", torch.float8_e4m3fn),
    "F8_E5M2": ("u1", torch.float8_e5m2),
    "F8_E8M0": ("u1", torch.float8_e8m0fnu),
    "I64": ("<i8", torch.int64),
    "I32": ("<i4", torch.int32),
    "I16": ("<i2", torch.int16),
    "I8": ("i1", torch.int8),
    "U8": ("u1", torch.uint8),
    "BOOL": ("u1", torch.bool),
}
assert all(map(is_plain, DTYPES))
_MAX_DIMS = 8
# Views of a read-only mapping must not be written. They never are: they are copied first.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
assert sys.byteorder == "little", "weights are stored little-endian and mapped as they are"


def map_file(path: Path) -> Bytes:
    """Map the bytes of a file that is not empty, without reading them."""
    return np.memmap(path, dtype=np.uint8, mode="r")


def item_size(dtype: str) -> int:
    """Bytes per element. Raises ValueError for a dtype that is not supported."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(DTYPES[dtype][0]).itemsize


def check_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """`shape` as a tuple. Raises ValueError if a tensor cannot have this shape."""
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"a tensor has {len(shape)} dimensions; at most {_MAX_DIMS} are supported")
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 48:
            raise ValueError(f"a tensor has the invalid shape {str(list(shape))[:200]}")
    return tuple(shape)


def plain_entry(
    name: str,
    data: Bytes,
    offset: int,
    num_elements: int,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> Entry:
    """The tensor of `shape` within the `num_elements` elements at byte `offset` of `data`. `strides`
    are in elements; without them the tensor is dense. Raises ValueError if it does not fit."""
    size = item_size(dtype)
    if offset < 0 or num_elements < 0 or offset + num_elements * size > data.size:
        raise ValueError(f"{name!r} is outside the file")
    count = math.prod(shape)
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    # The stride of a dimension of size 1 has no meaning and may be any number; with 1, the numbers of a
    # single column can be viewed as bytes.
    strides = tuple(1 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # An expanded tensor (stride 0) may claim any size from one stored number: it is rejected.
    if count and (min(strides, default=0) < 0 or last >= num_elements or count > num_elements):
        raise ValueError(f"{name!r} of shape {shape} does not fit its {num_elements} stored elements")
    as_numpy, as_torch = DTYPES[dtype]
    view: np.ndarray[Any, Any] | None = None
    if count:
        view = np.ndarray(shape, as_numpy, data, offset, [stride * size for stride in strides])

    def peek(slices: Slices) -> Tensor:
        check_slices(name, shape, slices)
        sizes = [part.stop - part.start for part in slices]
        if view is None or 0 in sizes:
            return torch.empty(sizes, dtype=as_torch)
        part = torch.from_numpy(view[slices] if slices else view)
        # A view of a stored byte 2 as bool would be neither true nor false; the comparison fixes it.
        return part != 0 if as_torch == torch.bool else part.view(as_torch)

    def read(slices: Slices) -> Tensor:
        return peek(slices).clone(memory_format=torch.contiguous_format)

    return Entry(shape, dtype, read, peek=peek)
