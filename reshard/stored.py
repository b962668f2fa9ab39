"""How weights that are stored as several tensors are divided: codes, scales, zero points. Pure.

Such a weight (compressed-tensors, GPTQ, AWQ and others) keeps its stored tensors, under their stored
names. Each is divided by itself: a rank holds every stored element that its part of the weight touches,
as `Entry.stored_in` names them. So no byte changes, and a border inside a group of columns gives both
neighbors its scale. A fused tensor gives a rank several ranges: its rows of query, key and value.

What is not here: which part of a weight a rank holds (`tp.shard`); tensors that are weights by
themselves (`reshard.plan`).
"""

from __future__ import annotations

from collections.abc import Mapping

from base.errors import InputError
from tp.shard import Layout, slices_of
from weights.checkpoint import Entry, Slices
from weights.formats.yoke_manifest import MAX_RANGES, STORED, Part, StoredTensor
from weights.writer import DTYPES

Ranges = tuple[tuple[int, int], ...]
Touched = list[list[set[tuple[int, int]]]]  # by rank and dimension: the slices that the rank touches


def stored_tensors(
    weights: Mapping[str, Entry], stored: Mapping[str, Entry], layouts: list[Layout]
) -> tuple[StoredTensor, ...]:
    """The tensors that `weights` (canonical names, entries with `stored_in`) are stored as, and the
    ranks' parts of each. `stored`: the entries of these tensors. Raises InputError if one cannot be
    divided."""
    touched: dict[str, Touched] = {}
    for name, entry in weights.items():
        assert entry.stored_in is not None
        for rank, layout in enumerate(layouts):
            for part_name, slices in entry.stored_in(slices_of(name, entry.shape, layout)):
                ranks = touched.setdefault(part_name, [])
                if not ranks:
                    ranks += [[set() for _ in slices] for _ in layouts]
                _add(ranks[rank], slices)
    return tuple(_tensor(name, stored[name], ranks) for name, ranks in touched.items())


def _add(dims: list[set[tuple[int, int]]], slices: Slices) -> None:
    for ranges, part in zip(dims, slices, strict=True):
        ranges.add((part.start, part.stop))


def _tensor(name: str, entry: Entry, touched: Touched) -> StoredTensor:
    """One stored tensor with its parts. Experts' stacks are touched expert by expert and row by row:
    a rank holds what it touches along one dimension, of all that is along the others."""
    if 0 in entry.shape or entry.stored_as not in DTYPES:
        raise InputError(
            f"{name} is stored as {entry.stored_as} of shape {list(entry.shape)}, which cannot be "
            "copied; --dequantize writes its weight as bf16"
        )
    ranks = [[merged(ranges) for ranges in dims] for dims in touched]
    cut = {
        dim
        for dims in ranks
        for dim, (ranges, size) in enumerate(zip(dims, entry.shape, strict=True))
        if ranges and ranges != ((0, size),)
    }
    if len(cut) > 1:
        raise InputError(
            f"{name} would be divided along dimensions {sorted(cut)}, which cannot be written; "
            "--dequantize writes its weight as bf16"
        )
    dim = cut.pop() if cut else None
    whole = StoredTensor(name, name, entry.stored_as, entry.shape, dim, STORED, ())
    if dim is None:
        parts = [Part(rank, ((0, whole.extent),)) for rank in range(len(ranks))]
    else:
        parts = [Part(rank, dims[dim]) for rank, dims in enumerate(ranks) if dims[dim]]
    most = max(len(part.ranges) for part in parts)
    if most > MAX_RANGES:
        raise InputError(
            f"{name}: one rank's part would have {most} ranges of rows, more than {MAX_RANGES}; "
            "--dequantize writes its weight as bf16"
        )
    return StoredTensor(name, name, entry.stored_as, entry.shape, dim, STORED, tuple(parts))


def merged(ranges: set[tuple[int, int]]) -> Ranges:
    """Ranges in order, those that overlap or touch as one.

    >>> merged({(4, 6), (0, 2), (2, 3)})
    ((0, 3), (4, 6))
    """
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)
