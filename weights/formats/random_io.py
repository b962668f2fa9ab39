"""A checkpoint of random weights, of any shape, without a file.

It serves to measure speed and memory without real weights. Each number is a hash of the tensor's name,
its position and the seed. So each rank computes only its own slices, and every world size has the same
model.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weights.checkpoint import Checkpoint, Entry, Slices, check_slices

BLOCK = 1 << 16  # elements hashed at a time: intermediate results stay in the cache
SCALE = 0.02  # the standard deviation at which the Llama family is initialized


def random_checkpoint(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Checkpoint:
    """A checkpoint with float32 weights: uniform with mean 0 and standard deviation 0.02; vectors
    (norms) are ones."""
    entries = {name: _entry(name, shape, seed) for name, shape in shapes.items()}
    return Checkpoint(Path("random"), "random", entries)


def _entry(name: str, shape: tuple[int, ...], seed: int) -> Entry:
    key = zlib.crc32(f"{seed}:{name}".encode())

    def read(slices: Slices) -> Tensor:
        check_slices(name, shape, slices)
        sizes = [part.stop - part.start for part in slices]
        if len(shape) == 1:
            return torch.ones(sizes)
        rows = torch.arange(slices[0].start, slices[0].stop, dtype=torch.int32)
        columns = torch.arange(slices[1].start, slices[1].stop, dtype=torch.int32)
        row_keys = _hash_(rows + (key & 0x7FFFFFFF), torch.empty_like(rows)).unsqueeze(1)
        values = torch.empty(sizes)
        block = max(BLOCK // max(sizes[1], 1), 1)
        hashed, spare = (torch.empty(block, sizes[1], dtype=torch.int32) for _ in range(2))
        for target, keys in zip(values.split(block), row_keys.split(block), strict=True):
            x, free = hashed[: len(keys)], spare[: len(keys)]
            torch.add(keys, columns, out=x)
            torch.mul(_hash_(x, free), SCALE * 3**0.5 / 2**31, out=target)
        return values

    return Entry(shape, "random", read)


def _hash_(x: Tensor, spare: Tensor) -> Tensor:
    """A 32-bit integer finalizer (multiply and xor-shift), elementwise and wrapping, in place:
    allocating memory for each step would take longer than the step. `spare`: as large as x."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        torch.bitwise_right_shift(x, shift, out=spare)
        spare &= 0xFFFFFFFF >> shift
        x ^= spare
        if factor != 1:
            x *= factor
    return x
