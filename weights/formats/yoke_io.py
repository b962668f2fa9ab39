"""Read Yoke's own form: whole tensors from one safetensors file per rank.

`weights.formats.yoke_manifest` describes the form. Any number of ranks can read any slice, and only the
files that hold it are read. What several ranks hold (KV heads, blocks at their borders) is read from
the lowest of them, or from the file of the rank `prefer`. So a rank that loads at the world size of the
files reads its own part from its own file.

Weights that are stored as several tensors are put together from these as in a Hugging Face folder
(`weights.formats.quant_hf`).

What is not here: checking the data against the manifest's digests, which would read all of it
(`reshard.verify`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import InputError
from weights.checkpoint import Checkpoint, Entry, Slices, check_slices
from weights.files import damaged, parse_json, read_json, regular_file
from weights.formats.gguf_blocks import reader_of_blocks, values_of_blocks
from weights.formats.quant_hf import with_quantized
from weights.formats.safetensors_io import stored_entries
from weights.formats.yoke_manifest import (
    MANIFEST,
    Blocks,
    Manifest,
    Part,
    StoredTensor,
    file_contents,
    rank_file,
    read_manifest,
)
from weights.names import translate
from weights.nested import text_config
from weights.schemes import GGUF_SCHEMES
from weights.views import canonical_entries
from weights.writer import DTYPES, header_of


@dataclass(frozen=True)
class YokeFolder:
    """A checked folder: its manifest, and the ranks' files, each opened on first use."""

    path: Path
    manifest: Manifest
    _opened: dict[int, dict[str, Entry]] = field(default_factory=dict, compare=False)

    def part(self, tensor: StoredTensor, rank: int) -> Tensor:
        """The part of `tensor` in the file of `rank`, as it is stored: a view of the mapped file."""
        if rank not in self._opened:  # two threads may both open it, which is harmless
            self._opened[rank] = stored_entries(self.path / rank_file(rank, self.manifest.world_size))
        entry = self._opened[rank][tensor.name]
        return (entry.peek or entry.read)(tuple(slice(0, size) for size in entry.shape))

    def peek(self, tensor: StoredTensor, parts: tuple[Part, ...], slices: Slices) -> Tensor:
        """A part of a tensor as it is stored; each piece comes from the first of `parts` that has it.
        The result is a view if one file has all of it. Slices are in elements, and of whole blocks."""
        if not tensor.shape:
            return self.part(tensor, parts[0].rank)
        along, found = tensor.along, []
        for part, at, start, stop in cover(tensor, parts, slices[along].start, slices[along].stop):
            local = list(slices)
            local[along] = slice(at, at + stop - start)
            if tensor.blocks is not None:
                local[-1] = _in_bytes(local[-1], tensor.blocks)
            found.append(self.part(tensor, part.rank)[tuple(local)])
        return found[0] if len(found) == 1 else torch.cat(found, along)


def _in_bytes(part: slice, blocks: Blocks) -> slice:
    assert part.start % blocks.elements == 0 and part.stop % blocks.elements == 0, (part, blocks)
    return slice(*(bound // blocks.elements * blocks.bytes for bound in (part.start, part.stop)))


def open_yoke(folder: Path, prefer: int | None = None) -> Checkpoint:
    """Open a folder in Yoke's form. Raises InputError unless manifest and files agree.

    The checkpoint's `format` is that of the source checkpoint, because it says how to read `config`. A
    `config.json` in the folder takes precedence over the manifest's copy: it is the one people edit.
    `prefer`: the rank whose file is read first.
    """
    opened = open_folder(folder)
    manifest = opened.manifest
    config = manifest.config
    if (folder / "config.json").is_file() and manifest.source_format != "gguf":
        config = text_config(read_json(folder / "config.json"))
    entries, stored = (
        {t.name: _entry(opened, t, prefer) for t in manifest.tensors if t.is_stored == is_stored}
        for is_stored in (False, True)
    )
    names = {t.name: t.stored_name for t in manifest.tensors if t.stored_name != t.name}
    if stored:
        weights, own = _quantized(opened, stored, config)
        twice = sorted(weights.keys() & entries.keys())
        if twice:
            raise InputError(
                f"{folder / MANIFEST} lists {twice[0]}, and tensors that make up this weight: reshard "
                "the model again"
            )
        entries, names = entries | weights, names | own
    return Checkpoint(
        folder,
        manifest.source_format,
        entries,
        config,
        names,
        manifest.world_size,
        files=tuple(folder / rank_file(i, manifest.world_size) for i in range(manifest.world_size)),
        stored=stored,
    )


def _quantized(
    folder: YokeFolder, stored: Mapping[str, Entry], config: Mapping[str, Any]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The canonical entries of the weights that the `stored` tensors make up, and the names of their
    modules' weights where they differ. Raises InputError if they do not fit the config."""
    manifest, file = folder.manifest, folder.path / MANIFEST
    weights = with_quantized(stored, config, str(file), {})
    left = next((name for name, entry in stored.items() if weights.get(name) is entry), None)
    if left is not None:
        raise InputError(
            f"{file}: {left} is listed as a tensor of a quantized weight, but the quantization_config "
            "has no such weights; use the config.json that belongs to the folder"
        )
    return canonical_entries(
        folder.path, weights, translate, lambda: (manifest.num_heads, manifest.num_kv_heads)
    )


def open_folder(folder: Path) -> YokeFolder:
    """Read the manifest and check the headers of the files against it. Raises InputError."""
    manifest = read_manifest(folder)
    for rank, size in enumerate(manifest.file_bytes):
        _check_file(folder / rank_file(rank, manifest.world_size), manifest, rank, size)
    return YokeFolder(folder, manifest)


def _check_file(file: Path, manifest: Manifest, rank: int, size: int) -> None:
    """Raise InputError unless a file holds exactly the parts of its rank, at the offsets of the
    writer."""
    wanted = header_of(file_contents(manifest.tensors, rank, manifest.world_size))
    ends = [item["data_offsets"][1] for name, item in wanted.items() if name != "__metadata__"]
    if not file.exists():
        raise InputError(f"{file} is missing, although yoke.json names it: copy the folder again")
    actual = regular_file(file, "safetensors")
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
            if actual != size or 8 + length + max(ends, default=0) != size:
                raise InputError(
                    f"{file} has {actual} bytes, including a header of {length}; yoke.json says "
                    f"{size}, including {max(ends, default=0)} of data: copy it again"
                )
            header: Any = parse_json(opened.read(length), unique=True)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(file, "safetensors", error) from error
    if not isinstance(header, dict):
        raise InputError(
            f"{file} cannot be read as safetensors: its header is not an object: copy it again"
        )
    if header.get("__metadata__") != wanted["__metadata__"]:
        raise InputError(
            f"{file} has the metadata {header.get('__metadata__')}, not that of its rank: copy it again"
        )
    if header != wanted:
        name = next(
            name for name in [*wanted, *header] if header.get(name) != wanted.get(name)
        )  # the first one that differs
        raise InputError(
            f"{file} and yoke.json disagree on {name!r}: the file says {header.get(name, 'nothing')}, "
            f"the manifest {wanted.get(name, 'nothing')}; both must come from one run: copy the folder "
            "again"
        )


def cover(
    tensor: StoredTensor, parts: tuple[Part, ...], start: int, stop: int
) -> Iterator[tuple[Part, int, int, int]]:
    """The parts to read for `[start, stop)`: (part, where its range begins in its file, the range's
    start and stop). At each position it is the first part that has it, up to the range's end."""
    while start < stop:
        part, at, end = next(
            (part, at + start - low, high)
            for part in parts
            for low, high, at in tensor.held(part)
            if low <= start < high
        )
        end = min(stop, end)
        yield part, at, start, end
        start = end


def _entry(folder: YokeFolder, tensor: StoredTensor, prefer: int | None) -> Entry:
    parts = tuple(sorted(tensor.parts, key=lambda part: (part.rank != prefer, part.rank)))

    def peek(slices: Slices) -> Tensor:
        check_slices(tensor.name, tensor.shape, slices)
        sizes = [part.stop - part.start for part in slices]
        if 0 in sizes:
            return torch.empty(sizes, dtype=DTYPES[tensor.dtype])
        return folder.peek(tensor, parts, slices)

    def read(slices: Slices) -> Tensor:
        return peek(slices).clone(memory_format=torch.contiguous_format)

    if tensor.blocks is None:
        return Entry(tensor.shape, tensor.dtype, read, peek=peek)
    blocks, where = tensor.blocks, f"{folder.path}: {tensor.name!r}"

    def read_raw(slices: Slices) -> Tensor:
        check_slices(tensor.name, tensor.shape, slices)
        return folder.peek(tensor, parts, slices).contiguous()

    def read_values(slices: Slices) -> Tensor:
        check_slices(tensor.name, tensor.shape, slices)
        sizes = [part.stop - part.start for part in slices]
        if 0 in sizes:
            return torch.empty(sizes)
        columns = slices[-1]
        first = columns.start // blocks.elements * blocks.elements
        last = -(-columns.stop // blocks.elements) * blocks.elements
        raw = folder.peek(tensor, parts, (*slices[:-1], slice(first, last)))
        values = values_of_blocks(raw, blocks.format, where)
        return values[..., columns.start - first : columns.stop - first]

    quant = reader_of_blocks(blocks.format, tensor.shape, read_raw, where)
    scheme = None if quant is None else GGUF_SCHEMES[blocks.format]
    return Entry(
        tensor.shape, blocks.format, read_values, blocks.elements, read_raw, scheme=scheme, quant=quant
    )


def unequal_replicas(folder: YokeFolder, tensor: StoredTensor) -> tuple[int, int] | None:
    """Two ranks whose copies of the same elements differ in at least one byte; None if all agree."""
    for part in tensor.parts[1:]:
        for start, stop, _ in tensor.held(part):
            for first, _, low, high in cover(tensor, tensor.parts, start, stop):
                if first.rank == part.rank:
                    continue
                slices = tensor.slices(low, high)
                ours, theirs = (folder.peek(tensor, (one,), slices) for one in (part, first))
                # Compared as bytes: as floats, a NaN is not equal to itself.
                if not torch.equal(_bytes(ours), _bytes(theirs)):
                    return first.rank, part.rank
    return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
