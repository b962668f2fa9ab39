"""Reading Yoke's own form: whole tensors over one safetensors file per rank.

`weights.yoke_manifest` describes the form. Any slice can be read, whatever the number of ranks that
read it: only the files that hold it are touched. KV heads that several ranks hold are read from the
lowest of them, or from the file of the rank that is given as `prefer`. A rank that loads at the world
size of the files thereby reads its own part from its own file.

Parts come as views of the mapped file where one file holds all of them. What is not here: checking
the data against the manifest's digests, which would read it all (`python -m tp.reshard --verify`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.checkpoint import Checkpoint, Entry, Slices, check_slices
from weights.errors import InputError
from weights.files import damaged, parse_json, read_json, regular_file
from weights.writer import DTYPES, header_of
from weights.yoke_manifest import (
    Blocks,
    Manifest,
    Part,
    StoredTensor,
    file_contents,
    rank_file,
    read_manifest,
)


@dataclass(frozen=True)
class YokeFolder:
    """A checked folder: its manifest, and the ranks' files, opened when they are first needed."""

    path: Path
    manifest: Manifest
    _opened: dict[int, safe_open] = field(default_factory=dict, compare=False)

    def part(self, tensor: StoredTensor, rank: int) -> Tensor:
        """What the file of `rank` holds of `tensor`, as it is stored: a view of the mapped file."""
        file = self.path / rank_file(rank, self.manifest.world_size)
        try:
            if rank not in self._opened:  # two threads may both open it, which does no harm
                self._opened[rank] = safe_open(str(file), framework="pt")
            stored: Tensor = self._opened[rank].get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}); copy it again") from error
        return stored

    def stored(self, tensor: StoredTensor, part: Part, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` along the divided dimension of what a part holds, as stored."""
        whole = self.part(tensor, part.rank)
        if not tensor.shape:
            return whole
        low, high = start - part.start, stop - part.start
        if tensor.blocks is not None and tensor.along == len(tensor.shape) - 1:
            blocks = tensor.blocks
            low = low // blocks.elements * blocks.bytes
            high = -(-high // blocks.elements) * blocks.bytes
        return whole.narrow(tensor.along, low, high - low)


def open_yoke(folder: Path, prefer: int | None = None) -> Checkpoint:
    """Open a folder in Yoke's form. Raises InputError unless manifest and files agree.

    The checkpoint's `format` is that of what the folder was made from, since it tells how `config` is
    to be read. A `config.json` in the folder counts before the manifest's copy: it is what people edit.
    """
    opened = open_folder(folder)
    manifest = opened.manifest
    config = manifest.config
    if (folder / "config.json").is_file() and manifest.source_format != "gguf":
        config = read_json(folder / "config.json")
    return Checkpoint(
        folder,
        manifest.source_format,
        {tensor.name: _entry(opened, tensor, prefer) for tensor in manifest.tensors},
        config,
        {t.name: t.stored_name for t in manifest.tensors if t.stored_name != t.name},
        manifest.world_size,
    )


def open_folder(folder: Path) -> YokeFolder:
    """The manifest, and what the files' headers say, checked. Raises InputError."""
    manifest = read_manifest(folder)
    for rank, size in enumerate(manifest.file_bytes):
        _check_file(folder / rank_file(rank, manifest.world_size), manifest, rank, size)
    return YokeFolder(folder, manifest)


def _check_file(file: Path, manifest: Manifest, rank: int, size: int) -> None:
    """A file must hold exactly the parts of its rank, in the places where the writer puts them."""
    wanted = header_of(file_contents(manifest.tensors, rank, manifest.world_size))
    ends = [item["data_offsets"][1] for name, item in wanted.items() if name != "__metadata__"]
    actual = regular_file(file, "safetensors")
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
            if actual != size or 8 + length + max(ends, default=0) != size:
                raise InputError(
                    f"{file} has {actual} bytes, a header of {length} among them; yoke.json says "
                    f"{size}, with {max(ends, default=0)} of data: copy it again"
                )
            header: Any = parse_json(opened.read(length), unique=True)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(file, "safetensors", error) from error
    if not isinstance(header, dict):
        raise InputError(f"{file} cannot be read as safetensors: its header is no object")
    if header.get("__metadata__") != wanted["__metadata__"]:
        raise InputError(f"{file} says that it is {header.get('__metadata__')}: copy it again")
    if header != wanted:
        name = next(
            name for name in [*wanted, *header] if header.get(name) != wanted.get(name)
        )  # the first one that differs
        raise InputError(
            f"{file} and yoke.json disagree on {name!r}: the file says {header.get(name, 'nothing')}, "
            f"the manifest {wanted.get(name, 'nothing')}; both must come from one run"
        )


def cover(parts: tuple[Part, ...], start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
    """Which parts to read for `[start, stop)`: from each position on the first part that has it."""
    while start < stop:
        part = next(part for part in parts if part.start <= start < part.stop)
        yield part, start, min(stop, part.stop)
        start = part.stop


def _entry(folder: YokeFolder, tensor: StoredTensor, prefer: int | None) -> Entry:
    parts = tuple(sorted(tensor.parts, key=lambda part: (part.rank != prefer, part.rank)))

    def stored(start: int, stop: int) -> Tensor:
        pieces = [folder.stored(tensor, *piece) for piece in cover(parts, start, stop)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, tensor.along)

    def read(slices: Slices) -> Tensor:
        check_slices(tensor.name, tensor.shape, slices)
        if not tensor.shape:
            return stored(0, 1)
        sizes = [part.stop - part.start for part in slices]
        if 0 in sizes:
            return torch.empty(sizes, dtype=DTYPES[tensor.dtype])
        others = list(slices)
        bounds = others[tensor.along]
        others[tensor.along] = slice(0, bounds.stop - bounds.start)
        return stored(bounds.start, bounds.stop)[tuple(others)]

    if tensor.blocks is None:
        return Entry(tensor.shape, tensor.dtype, read)
    blocks = tensor.blocks

    def read_raw(slices: Slices) -> Tensor:
        check_slices(tensor.name, tensor.shape, slices)
        columns = slices[-1]
        assert columns.start % blocks.elements == 0 and columns.stop % blocks.elements == 0, slices
        return _raw(slices)

    def _raw(slices: Slices) -> Tensor:
        """Whole blocks that hold `slices`."""
        low = slices[-1].start // blocks.elements
        high = -(-slices[-1].stop // blocks.elements)
        bounds = slices[tensor.along]
        if tensor.along == len(slices) - 1:
            part = stored(low * blocks.elements, high * blocks.elements)
            return part[slices[:-1]]
        part = stored(bounds.start, bounds.stop)
        others = list(slices)
        others[tensor.along] = slice(0, bounds.stop - bounds.start)
        others[-1] = slice(low * blocks.bytes, high * blocks.bytes)
        return part[tuple(others)]

    def read_values(slices: Slices) -> Tensor:
        check_slices(tensor.name, tensor.shape, slices)
        sizes = [part.stop - part.start for part in slices]
        if 0 in sizes:
            return torch.empty(sizes)
        values = dequantise(_raw(slices), blocks)
        skipped = slices[-1].start % blocks.elements
        return values[..., skipped : skipped + sizes[-1]]

    return Entry(tensor.shape, blocks.format, read_values, blocks.elements, read_raw)


def dequantise(raw: Tensor, blocks: Blocks) -> Tensor:
    """Blocks along the last dimension, uint8 [..., bytes], as float32 [..., elements]."""
    from gguf import GGMLQuantizationType  # only quantised weights need the package
    from gguf.quants import dequantize

    values = dequantize(raw.contiguous().numpy(), GGMLQuantizationType[blocks.format])
    return torch.from_numpy(values)


def unequal_replicas(folder: YokeFolder, tensor: StoredTensor) -> tuple[int, int] | None:
    """Two ranks whose copies of the same elements differ in some byte; None if all agree."""
    for part in tensor.parts[1:]:
        for first, start, stop in cover(tensor.parts, part.start, part.stop):
            if first.rank == part.rank:
                continue
            ours = folder.stored(tensor, part, start, stop)
            theirs = folder.stored(tensor, first, start, stop)
            # As bytes: a NaN is not equal to itself.
            if not torch.equal(_bytes(ours), _bytes(theirs)):
                return first.rank, part.rank
    return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
