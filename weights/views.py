"""Entries derived from other entries: some rows of one, several concatenated, or rows reordered.

They present a fused, split or reordered file as whole canonical tensors. Making a view reads nothing;
reading a slice of a view reads the slices it needs of the entries below, as a tensor or raw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import InputError
from weights.checkpoint import Checkpoint, Entry, ReadQuant, Slices, StoredIn, check_slices
from weights.locate import Source
from weights.names import CanonicalPart
from weights.quant import QuantWeight, join_rows

Read = Callable[[Slices], Tensor]


def present(
    source: Source,
    stored: Mapping[str, Entry],
    translate: Callable[[str], tuple[CanonicalPart, ...]],
    config: Mapping[str, Any],
    heads: Callable[[], tuple[int, int]],
) -> Checkpoint:
    """The checkpoint with canonical entries. `heads()` returns the numbers of query and KV heads of the
    model; it is called only if rows are fused or interleaved. Raises InputError if two tensors have one
    canonical name, if there are none, or if rows do not fit the heads."""
    entries, stored_names = canonical_entries(source.path, stored, translate, heads)
    return Checkpoint(
        source.path,
        source.form,
        entries,
        config,
        stored_names,
        beside=source.folder,
        files=source.files,
    )


def canonical_entries(
    path: Path,
    stored: Mapping[str, Entry],
    translate: Callable[[str], tuple[CanonicalPart, ...]],
    heads: Callable[[], tuple[int, int]],
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries of `present`, and the stored names of those whose names differ. `path` is for
    messages. Raises InputError as `present` does."""
    entries: dict[str, Entry] = {}
    stored_names: dict[str, str] = {}
    for stored_name, entry in stored.items():
        for piece in translate(stored_name):
            if piece.name in entries:
                first = stored_names.get(piece.name, piece.name)
                raise InputError(
                    f"{path} stores {piece.name!r} twice, as {first!r} and as {stored_name!r}; "
                    "remove the files that do not belong to the model"
                )
            entries[piece.name] = _piece(path, stored_name, entry, piece, heads)
            if piece.name != stored_name:
                stored_names[piece.name] = stored_name
    if not entries:
        raise InputError(f"{path} holds no weights; download the model again")
    return entries, stored_names


def _piece(
    path: Path,
    stored_name: str,
    entry: Entry,
    piece: CanonicalPart,
    heads: Callable[[], tuple[int, int]],
) -> Entry:
    if piece.expert is not None:
        return matrix_of(entry, piece.expert)
    if piece.plus_one:
        return less_one(entry)
    if not piece.part and not piece.interleaved:
        return entry
    if not entry.shape:
        raise InputError(f"{path}: {stored_name!r} is a scalar; it must have rows")
    size = entry.shape[0]
    if piece.part in ("gate", "up"):
        if size % 2:
            raise InputError(
                f"{path}: {stored_name!r} has {size} rows; gate and up need an even number"
            )
        start = 0 if piece.part == "gate" else size // 2
        return rows_of(entry, start, start + size // 2)
    num_q, num_kv = heads()
    is_q = ".q_proj." in piece.name
    own = num_q if is_q else num_kv
    held = num_q + 2 * num_kv if piece.part else own
    if size % held or (piece.interleaved and size // held % 2):
        raise InputError(
            f"{path}: {stored_name!r} has {size} rows, which are not {held} heads of "
            f"{'an even' if piece.interleaved else 'one'} size ({num_q} query and {num_kv} KV heads)"
        )
    head_dim = size // held
    if piece.grouped and num_kv > 1:  # with one KV head the order is that of plain fused rows
        return grouped_rows(entry, piece.part, num_q // num_kv, num_kv, head_dim)
    if piece.part:
        start = {"q": 0, "k": num_q, "v": num_q + num_kv}[piece.part] * head_dim
        entry = rows_of(entry, start, start + own * head_dim)
    return deinterleave(entry, head_dim) if piece.interleaved and head_dim else entry


def _rebuild(
    entry: Entry,
    shape: tuple[int, ...],
    wrap: Callable[[Read], Read],
    below: Callable[[Slices], list[Slices]],
    wrap_quant: Callable[[ReadQuant], ReadQuant] | None = None,
) -> Entry:
    """`entry` with another shape, and with all its read functions wrapped. `below(slices)` are the
    slices of `entry` that a part is read from. Without `wrap_quant` it can no longer be read
    quantized."""
    stored_in = entry.stored_in
    raw = None if entry.read_raw is None else wrap(entry.read_raw)
    peek = None if entry.peek is None else wrap(entry.peek)
    quant = None if entry.quant is None or wrap_quant is None else wrap_quant(entry.quant)
    scheme = None if quant is None else entry.scheme
    return replace(
        entry, shape=shape, read=wrap(entry.read), read_raw=raw, peek=peek, scheme=scheme, quant=quant,
        quant_of=None, stored_in=None if stored_in is None else _chained(stored_in, below),
    )  # fmt: skip


def _chained(stored_in: StoredIn, below: Callable[[Slices], list[Slices]]) -> StoredIn:
    return lambda slices: [each for part in below(slices) for each in stored_in(part)]


def rows_of(entry: Entry, start: int, stop: int) -> Entry:
    """Rows `[start, stop)` as an entry of their own."""
    shape = (stop - start, *entry.shape[1:])

    def below(slices: Slices) -> list[Slices]:
        check_slices("rows", shape, slices)
        rows = slices[0]
        return [(slice(rows.start + start, rows.stop + start), *slices[1:])]

    def wrap(read: Read) -> Read:
        return lambda slices: read(below(slices)[0])

    def wrap_quant(quant: ReadQuant) -> ReadQuant:
        return lambda rows, columns: quant(slice(rows.start + start, rows.stop + start), columns)

    return _rebuild(entry, shape, wrap, below, wrap_quant)


def matrix_of(entry: Entry, index: int) -> Entry:
    """One matrix of a stack of matrices [count, n, k], by its index."""
    shape = entry.shape[1:]

    def below(slices: Slices) -> list[Slices]:
        check_slices("matrix", shape, slices)
        return [(slice(index, index + 1), *slices)]

    def wrap(read: Read) -> Read:
        return lambda slices: read(below(slices)[0])[0]

    found = _rebuild(entry, shape, wrap, below)
    if entry.quant_of is None:
        return found
    return replace(found, scheme=entry.scheme, quant=partial(entry.quant_of, index))


def less_one(entry: Entry) -> Entry:
    """A tensor that is stored with 1 added, without that 1, in float32: adding 1 again gives exactly
    the stored bits."""

    def read(slices: Slices) -> Tensor:
        return entry.read(slices).float() - 1

    return replace(
        entry, stored_as="F32", block=1, read=read, read_raw=None, peek=None, scheme=None, quant=None,
        stored_in=None,
    )  # fmt: skip


def grouped_rows(entry: Entry, part: str, group: int, num_kv: int, head_dim: int) -> Entry:
    """The rows of "q", "k" or "v" of a fused weight in which the `group` query heads of each KV head
    come first, then its key and value heads."""
    stride = (group + 2) * head_dim
    size = (group if part == "q" else 1) * head_dim
    offset = {"q": 0, "k": group, "v": group + 1}[part] * head_dim
    shape = (num_kv * size, *entry.shape[1:])

    def stored(wanted: slice) -> list[slice]:
        """The ranges of stored rows that make up `wanted`, in order."""
        start, stop = wanted.start, wanted.stop
        if start == stop:
            return [slice(0, 0)]
        found = []
        for kv in range(start // size, -(-stop // size)):
            low, high = max(start, kv * size), min(stop, (kv + 1) * size)
            base = kv * stride + offset - kv * size
            found.append(slice(base + low, base + high))
        return found

    def below(slices: Slices) -> list[Slices]:
        check_slices("rows", shape, slices)
        return [(rows, *slices[1:]) for rows in stored(slices[0])]

    def wrap(read: Read) -> Read:
        def part(slices: Slices) -> Tensor:
            found = [read(each) for each in below(slices)]
            return found[0] if len(found) == 1 else torch.cat(found)

        return part

    def wrap_quant(quant: ReadQuant) -> ReadQuant:
        return lambda rows, columns: join_rows([quant(some, columns) for some in stored(rows)])

    return _rebuild(entry, shape, wrap, below, wrap_quant)


def deinterleave(entry: Entry, head_dim: int) -> Entry:
    """Reorder rows that are stored per head as (half a head, 2) into the canonical order (2, half a
    head). Whole heads are read and then sliced, so any range of rows can be read."""

    def heads(rows: slice) -> slice:
        return slice(rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim)

    def ordered(whole: Tensor, rows: slice) -> Tensor:
        """The canonical `rows`, from the stored rows of the `whole` heads that hold them."""
        pairs = whole.reshape(len(whole) // head_dim, head_dim // 2, 2, *whole.shape[1:])
        first = heads(rows).start
        return pairs.transpose(1, 2).reshape(whole.shape)[rows.start - first : rows.stop - first]

    def below(slices: Slices) -> list[Slices]:
        check_slices("rows", entry.shape, slices)
        return [(heads(slices[0]), *slices[1:])]

    def wrap(read: Read) -> Read:
        return lambda slices: ordered(read(below(slices)[0]), slices[0])

    def wrap_quant(quant: ReadQuant) -> ReadQuant:
        def part(rows: slice, columns: slice) -> QuantWeight:
            return quant(heads(rows), columns).with_rows(lambda each: ordered(each, rows))

        return part

    return _rebuild(entry, entry.shape, wrap, below, wrap_quant)


def concat(parts: list[Entry], dim: int) -> Entry:
    """Entries concatenated along `dim`. A slice reads only the entries that it overlaps."""
    shape = list(parts[0].shape)
    starts = [0]
    for entry in parts:
        starts.append(starts[-1] + entry.shape[dim])
    shape[dim] = starts[-1]
    full = tuple(shape)

    def read(slices: Slices) -> Tensor:
        check_slices("parts", full, slices)
        wanted = slices[dim]
        found = []
        for entry, start, stop in zip(parts, starts, starts[1:], strict=False):
            low, high = max(wanted.start, start), min(wanted.stop, stop)
            if low < high:
                local = list(slices)
                local[dim] = slice(low - start, high - start)
                found.append(entry.read(tuple(local)))
        if not found:
            nothing = list(slices)
            nothing[dim] = slice(0, 0)
            return parts[0].read(tuple(nothing))
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    return replace(
        parts[0],
        shape=full,
        read=read,
        read_raw=None,
        peek=None,
        scheme=None,
        quant=None,
        stored_in=None,
    )


def replicated(path: Path, name: str, copies: list[Entry]) -> Entry:
    """A tensor that every file holds a copy of. Each read compares the copies; it raises InputError if
    they differ."""

    def read(slices: Slices) -> Tensor:
        first = copies[0].read(slices)
        for other in copies[1:]:
            # Compared as bytes: a NaN is equal to itself here.
            if not torch.equal(other.read(slices).view(torch.uint8), first.view(torch.uint8)):
                raise InputError(
                    f"{path}: the files disagree on {name!r}, although each must hold the same copy; "
                    "they are not parts of one model: download it again"
                )
        return first

    return replace(
        copies[0], read=read, read_raw=None, peek=None, scheme=None, quant=None, stored_in=None
    )
