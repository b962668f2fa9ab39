"""Every way to split the pieces of a vocabulary into two other pieces: the merges of a BPE model whose
file has none.

A vocabulary of 262,144 pieces has two million places to split at, of which one in four or fewer leaves
two pieces. So all parts get a hash, and a table says which hashes pieces have. Only the parts that the
table lets through are cut out and looked up. A wrong hit costs time, and never changes the result.

What is not here: the order of merges (`models.tokenizer.spm`, `models.tokenizer.byte_level`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T", str, bytes)
_Words = NDArray[np.uint64]
_Places = NDArray[np.int64]

_LONGEST = 4096  # characters of a piece
_WORK = 64  # characters compared per character of the vocabulary
_BLOCK = 1 << 17  # characters that are hashed at once: their arrays stay in the CPU caches
_BITS = 24  # of a place in the table, which takes 16 MiB
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_MIX = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class _Block:
    """Some pieces, one behind the other: where each starts and ends, and the sums from which the hash
    of any part follows. `sums[i]`: the characters before i, each times a power of the base.
    `inverse[i]`: the inverse of the base to the power i. All are modulo 2**64."""

    starts: _Places
    ends: _Places
    sums: _Words
    inverse: _Words


def divisions(pieces: Sequence[_T]) -> list[tuple[_T, _T]]:
    """Every split of each piece into two of the pieces, in order. Raises ValueError for a piece that is
    too long, and if cutting the parts out takes far longer than reading the pieces."""
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    longest = int(sizes.max(initial=0))
    if longest > _LONGEST:
        raise ValueError(f"a piece of {longest} characters; {_LONGEST} is the most")
    blocks = [slice(*bounds) for bounds in pairwise(_bounds(sizes))]
    table = np.zeros(1 << _BITS, bool)
    for block in blocks:
        hashed = _hashed(pieces[block], sizes[block])
        table[_slots(hashed, hashed.starts, hashed.ends)] = True
    get = dict(zip(pieces, pieces, strict=True)).get  # the pieces themselves take no more memory
    budget = _WORK * int(sizes.sum()) + (1 << 20)
    found: list[tuple[_T, _T]] = []
    for block in blocks:
        owners, cuts, work = _likely(_hashed(pieces[block], sizes[block]), table)
        budget -= work
        if budget < 0:
            raise ValueError("its pieces can be put together from others in too many ways")
        found += [
            (left, right)
            for piece, cut in zip(map(pieces[block].__getitem__, owners), cuts, strict=True)
            if (left := get(piece[:cut])) is not None and (right := get(piece[cut:])) is not None
        ]
    return found


def _bounds(sizes: _Places) -> list[int]:
    """Where blocks of pieces of these sizes begin and end: each has _BLOCK characters and the rest of a
    piece, or is the last."""
    ends = np.cumsum(sizes)
    marks = np.arange(_BLOCK, int(ends[-1]) if len(ends) else 0, _BLOCK)
    return sorted({0, *(np.searchsorted(ends, marks) + 1).tolist(), len(sizes)})


def _hashed(block: Sequence[Any], sizes: _Places) -> _Block:
    ends = np.cumsum(sizes)
    codes = _codes(block)
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * _powers(_BASE)[: len(codes)], out=sums[1:])
    return _Block(ends - sizes, ends, sums, _powers(pow(_BASE, -1, 1 << 64)))


def _codes(block: Sequence[Any]) -> _Words:
    """The characters as numbers above zero."""
    if isinstance(block[0], bytes):
        codes = np.frombuffer(b"".join(block), np.uint8)
    else:
        codes = np.frombuffer("".join(block).encode("utf-32-le", "surrogatepass"), np.uint32)
    return codes.astype(np.uint64) + np.uint64(1)


@functools.cache
def _powers(base: int) -> _Words:
    """As many powers of the base as a block can need, from 0 on."""
    factors = np.full(_BLOCK + _LONGEST, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def _slots(block: _Block, begin: _Places, end: _Places) -> _Places:
    """The places in the table of the parts [begin, end)."""
    hashes = (block.sums[end] - block.sums[begin]) * block.inverse[begin]
    mixed = (hashes ^ (hashes >> np.uint64(29))) * _MIX
    return (mixed >> np.uint64(64 - _BITS)).astype(np.int64)


def _likely(block: _Block, table: NDArray[np.bool_]) -> tuple[list[int], list[int], int]:
    """The splits whose parts the table knows, as pieces and cuts; and the characters of all these
    pieces."""
    sizes = block.ends - block.starts
    owners = np.repeat(np.arange(len(sizes)), sizes)
    cuts = np.arange(len(owners)) - block.starts[owners]
    owners, cuts = owners[cuts > 0], cuts[cuts > 0]
    starts = block.starts[owners]
    there = table[_slots(block, starts, starts + cuts)]
    owners, cuts, starts = owners[there], cuts[there], starts[there]
    there = table[_slots(block, starts + cuts, block.ends[owners])]
    owners, cuts = owners[there], cuts[there]
    return owners.tolist(), cuts.tolist(), int(sizes[owners].sum())
