"""`yoke.json`: what a folder in Yoke's own form holds, and which rank holds which part of it.

The form is one safetensors file per rank and this manifest. For each weight, the manifest gives the
full shape, how the weight is sharded and which rank holds which part. So a reader needs neither the
model's family nor the table by which it was sharded. All of it is validated before use; a manifest may
be damaged, edited or made by other software.

    {"format": "yoke", "version": 2, "world_size": 16, "num_heads": 64, "num_kv_heads": 8,
     "head_dim": 128, "source_format": "safetensors", "digest": "sha256", "config": {...},
     "files": [{"name": "rank-00000-of-00016.safetensors", "bytes": 8633}, ...],
     "tensors": [{"name": "model.layers.0.self_attn.k_proj.weight", "stored_name": "...",
                  "dtype": "BF16", "shape": [1024, 8192], "dim": 0, "axis": "kv", "blocks": null,
                  "parts": [[rank, start, stop, digest], ...]}, ...]}

`parts` are in elements along `dim`. With `dim` null every part is the whole tensor: one for each rank,
or only rank 0's if `axis` is "first" (the loader gives the other ranks zeros). Parts of axis "kv" may
overlap: every rank that needs a KV head holds it.

Two forms keep the bytes of quantized weights, wherever a border between ranks is:

- `blocks` describes GGUF's: bytes along the last dimension, {"format": "Q4_K", "elements": 256,
  "bytes": 144}. A part's file holds the whole blocks that its elements touch. So both neighbors hold a
  block that their border cuts.
- A weight that is stored as several tensors (codes and factors: compressed-tensors, GPTQ, AWQ and
  others) is listed as these, each as its own tensor under its stored name, with `axis` "stored". Each
  is divided along its own `dim`, in its own elements, such as one scale of 128 columns. A part is
  whatever a rank's columns or rows touch, so such parts may overlap, and may be several ranges (of
  fused weights): [rank, start, stop, start, stop, ..., digest]. The reader joins the parts to the
  stored tensors and reads these as in a Hugging Face folder, with `config`'s quantization_config. So
  the manifest knows no format of theirs.

Version 1 had one range per part, none of the second form, and no borders inside blocks. It is read as
well.

What is not here: reading tensors (`weights.formats.yoke_io`), and deciding which rank holds what
(`reshard.plan`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.checkpoint import Slices
from weights.files import read_json
from weights.writer import DIGEST, DTYPES, Tensors

MANIFEST = "yoke.json"
VERSION = 2
READABLE = (1, 2)
STORED = "stored"  # the axis of tensors that are a part of a quantized weight
MAX_RANGES = 1 << 12  # of one part
MAX_RANKS = 1 << 16
_MAX_DIM = 1 << 40


@dataclass(frozen=True)
class Part:
    """The elements that `rank` holds along the sharded dimension: `ranges` of [start, stop), which are
    in order and do not touch. There are several only of tensors with the axis STORED."""

    rank: int
    ranges: tuple[tuple[int, int], ...]
    digest: str = ""

    @property
    def start(self) -> int:
        return self.ranges[0][0]

    @property
    def stop(self) -> int:
        return self.ranges[-1][1]


@dataclass(frozen=True)
class Blocks:
    """How a quantized tensor is stored: blocks of `elements` numbers of the last dimension, of `bytes`
    bytes each."""

    format: str
    elements: int
    bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """One weight, or a tensor of a weight that is stored as several: its names, its full shape in
    elements, and its parts in order of rank."""

    name: str
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    dim: int | None
    axis: str
    parts: tuple[Part, ...]
    blocks: Blocks | None = None

    @property
    def along(self) -> int:
        return self.dim or 0

    @property
    def extent(self) -> int:
        """The size of the sharded dimension; 1 for a scalar."""
        return self.shape[self.along] if self.shape else 1

    @property
    def is_stored(self) -> bool:
        """Whether it is a tensor of a weight that is stored as several, under its stored name."""
        return self.axis == STORED

    def covering(self, start: int, stop: int) -> tuple[int, int]:
        """[start, stop) along the sharded dimension, extended to whole blocks."""
        unit = self.blocks.elements if self.blocks and self.along == len(self.shape) - 1 else 1
        return start // unit * unit, -(-stop // unit) * unit

    def held(self, part: Part) -> Iterator[tuple[int, int, int]]:
        """Yields the ranges in the file of a part, in whole blocks: (start, stop, the element of the
        file's tensor at which it begins)."""
        at = 0
        for bounds in part.ranges:
            start, stop = self.covering(*bounds)
            yield start, stop, at
            at += stop - start

    def slices(self, start: int, stop: int) -> Slices:
        """The slices of [start, stop) of the full tensor, in elements and whole blocks."""
        slices = [slice(0, size) for size in self.shape]
        if slices:
            slices[self.along] = slice(*self.covering(start, stop))
        return tuple(slices)

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape of a part in its file."""
        shape = list(self.shape)
        if shape:
            shape[self.along] = sum(stop - start for start, stop, _ in self.held(part))
        if self.blocks is not None:
            shape[-1] = shape[-1] // self.blocks.elements * self.blocks.bytes
        return tuple(shape)


@dataclass(frozen=True)
class Manifest:
    """A folder in Yoke's form. `config` and `source_format` are those of the source checkpoint;
    `file_bytes` are the sizes of the ranks' files."""

    world_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    source_format: str
    config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]
    file_bytes: tuple[int, ...]


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05}-of-{world_size:05}.safetensors"


def file_contents(tensors: tuple[StoredTensor, ...], rank: int, world_size: int) -> Tensors:
    """The contents of a rank's file, in the order of the tensors."""
    shapes = {
        tensor.name: (tensor.dtype, tensor.part_shape(part))
        for tensor in tensors
        for part in tensor.parts
        if part.rank == rank
    }
    return Tensors(shapes, {"format": "pt", "yoke": f"rank {rank} of {world_size}"})


def to_json(manifest: Manifest) -> str:
    """The text of `yoke.json`, one tensor per line. Raises InputError if the config has a value that
    JSON cannot represent."""
    ranks = manifest.world_size
    head: dict[str, Any] = {"format": "yoke", "version": VERSION, "world_size": ranks}
    head |= {key: getattr(manifest, key) for key in ("num_heads", "num_kv_heads", "head_dim")}
    head |= {"source_format": manifest.source_format, "digest": DIGEST, "config": dict(manifest.config)}
    head["files"] = [
        {"name": rank_file(rank, ranks), "bytes": size} for rank, size in enumerate(manifest.file_bytes)
    ]
    lines = ",\n".join(json.dumps(_tensor_object(tensor)) for tensor in manifest.tensors)
    opening = json.dumps(head, default=_plain, ensure_ascii=False)[:-1]
    return f'{opening}, "tensors": [\n{lines}\n]}}\n'


def _plain(value: Any) -> Any:
    """Convert numpy numbers and arrays, which GGUF's metadata may contain."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise InputError(
        f"the model's configuration holds a {type(value).__name__}, which JSON cannot represent"
    )


def _tensor_object(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "stored_name": tensor.stored_name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "dim": tensor.dim,
        "axis": tensor.axis,
        "blocks": None if tensor.blocks is None else vars(tensor.blocks),
        "parts": [
            [part.rank, *(bound for bounds in part.ranges for bound in bounds), part.digest]
            for part in tensor.parts
        ],
    }


def read_manifest(folder: Path) -> Manifest:
    """Read and check `yoke.json`. Raises InputError if it is not valid."""
    file = folder / MANIFEST
    try:
        return _manifest(read_json(file, unique=True))
    except _Wrong as error:
        raise InputError(f"{file}: {error}; copy the folder again, or reshard it again") from error


class _Wrong(Exception):
    """An error in a manifest; the caller adds the file's name."""


def _manifest(head: dict[str, Any]) -> Manifest:
    if head.get("format") != "yoke":
        raise _Wrong(f"format is {head.get('format')!r}, it must be 'yoke'")
    if type(head.get("version")) is not int or head["version"] not in READABLE:
        raise _Wrong(
            f"version is {head.get('version')!r}, but this version of Yoke reads "
            f"{' and '.join(map(str, READABLE))}"
        )
    if head.get("digest") != DIGEST:
        raise _Wrong(f"digest is {head.get('digest')!r}, it must be {DIGEST!r}")
    ranks = _integer(head, "world_size", 1, MAX_RANKS)
    num_heads = _integer(head, "num_heads", 1, 1 << 24)
    num_kv = _integer(head, "num_kv_heads", 1, num_heads)
    head_dim = _integer(head, "head_dim", 1, 1 << 24)
    if num_heads % num_kv:
        raise _Wrong(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv}")
    files = _list(head, "files")
    if len(files) != ranks:
        raise _Wrong(f"{len(files)} files for a world_size of {ranks}: each rank must have one file")
    sizes = []
    for rank, item in enumerate(files):
        named, wanted = _object(item, f"files[{rank}]"), rank_file(rank, ranks)
        # This also rejects every path that leads out of the folder.
        if named.get("name") != wanted:
            raise _Wrong(f"files[{rank}] is named {named.get('name')!r}, it must be {wanted!r}")
        sizes.append(_integer(named, "bytes", 8, 1 << 60))
    tensors = tuple(
        _tensor(_object(item, f"tensors[{i}]"), ranks) for i, item in enumerate(_list(head, "tensors"))
    )
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"{twice} is listed twice")
    for tensor in tensors:
        wanted_extent = {"q": num_heads * head_dim, "kv": num_kv * head_dim}.get(tensor.axis)
        if tensor.dim is not None and wanted_extent not in (None, tensor.extent):
            raise _Wrong(
                f"{tensor.name} has {tensor.extent} elements along its heads, but {num_heads} query "
                f"and {num_kv} KV heads of {head_dim} make {wanted_extent}"
            )
    source_format = _text(head, "source_format")
    odd = next((tensor.name for tensor in tensors if tensor.is_stored), None)
    if odd is not None and source_format == "gguf":
        raise _Wrong(f"{odd} is a tensor of a quantized weight, which source_format 'gguf' has none of")
    return Manifest(
        ranks,
        num_heads,
        num_kv,
        head_dim,
        source_format,
        _object(head.get("config"), "config"),
        tensors,
        tuple(sizes),
    )


def _tensor(item: dict[str, Any], ranks: int) -> StoredTensor:
    name = _text(item, "name")
    try:
        dtype = _text(item, "dtype")
        if dtype not in DTYPES:
            raise _Wrong(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        sizes = _list(item, "shape")
        if not all(type(size) is int and 0 < size <= _MAX_DIM for size in sizes) or len(sizes) > 8:
            raise _Wrong(f"shape {sizes} is not a shape of a weight")
        if prod(sizes) > 1 << 56:
            raise _Wrong(f"shape {sizes} is larger than any weight")
        dim = None if item.get("dim") is None else _integer(item, "dim", 0, len(sizes) - 1)
        axis = item.get("axis")
        if not isinstance(axis, str) or (dim is not None and not axis):
            raise _Wrong(f"axis {axis!r} must be the name of the axis along which it is sharded")
        blocks = None if item.get("blocks") is None else _blocks(item, dtype, sizes)
        parts = tuple(_part(part, ranks) for part in _list(item, "parts"))
        tensor = StoredTensor(
            name, _text(item, "stored_name"), dtype, tuple(sizes), dim, axis, parts, blocks
        )
        _check_parts(tensor, ranks)
        return tensor
    except _Wrong as error:
        raise _Wrong(f"{name}: {error}") from None


def _blocks(item: dict[str, Any], dtype: str, shape: list[int]) -> Blocks:
    given = _object(item["blocks"], "blocks")
    blocks = Blocks(
        _text(given, "format"),
        _integer(given, "elements", 2, 1 << 20),
        _integer(given, "bytes", 1, 1 << 20),
    )
    if block_sizes(blocks.format) != (blocks.elements, blocks.bytes):
        raise _Wrong(f"there is no GGUF block format {vars(blocks)}")
    if item.get("axis") == STORED:
        raise _Wrong(f"it is a tensor of a quantized weight (axis {STORED!r}), and has blocks")
    if dtype != "U8" or not shape or shape[-1] % blocks.elements:
        raise _Wrong(f"{dtype} of shape {shape} cannot be stored as blocks of {blocks.elements}")
    return blocks


def block_sizes(kind: str) -> tuple[int, int] | None:
    """Elements and bytes of a block of a GGUF block format; None for an unknown name."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # imported only for quantized weights

    if kind not in GGMLQuantizationType.__members__:
        return None
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(elements), int(size)


def _part(given: Any, ranks: int) -> Part:
    if not isinstance(given, list) or len(given) < 4 or len(given) % 2:
        raise _Wrong(f"part {str(given)[:200]} is not [rank, start, stop, digest]")
    rank, *bounds, digest = given
    if not all(type(number) is int for number in (rank, *bounds)) or not 0 <= rank < ranks:
        raise _Wrong(f"part {str(given)[:200]} does not name one of {ranks} ranks and its elements")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise _Wrong(f"part {str(given)[:200]} has no {DIGEST} digest")
    if len(bounds) > 2 * MAX_RANGES:
        raise _Wrong(f"the part of rank {rank} has {len(bounds) // 2} ranges, more than {MAX_RANGES}")
    return Part(rank, tuple(zip(bounds[::2], bounds[1::2], strict=True)), digest)


def _check_parts(tensor: StoredTensor, ranks: int) -> None:
    """Raise _Wrong unless the parts cover the tensor without gaps, and overlap only along axis "kv" or
    STORED."""
    held, extent = [part.rank for part in tensor.parts], tensor.extent
    if held != sorted(set(held)):
        raise _Wrong(f"its parts belong to ranks {held[:20]}: each rank may occur once, in order")
    if tensor.dim is None:
        wanted = [0] if tensor.axis == "first" else list(range(ranks))
        if held != wanted or any(part.ranges != ((0, extent),) for part in tensor.parts):
            raise _Wrong(f"it is not sharded: ranks {wanted[:20]} must each hold the whole tensor")
        return
    for part in tensor.parts:
        if len(part.ranges) > 1 and not tensor.is_stored:
            raise _Wrong(f"the part of rank {part.rank} has several ranges, which axis {STORED!r} may")
        for (_, stop), (start, _) in pairwise(part.ranges):
            if start <= stop:
                raise _Wrong(f"the part of rank {part.rank} has ranges that are not in order")
    reached = 0
    for start, stop in sorted(bounds for part in tensor.parts for bounds in part.ranges):
        if not 0 <= start < stop <= extent:
            raise _Wrong(f"elements {start}..{stop} of {extent} are not a part of it")
        if start > reached or (start < reached and tensor.axis not in ("kv", STORED)):
            raise _Wrong(f"its parts do not cover it: one starts at {start}, not at {reached}")
        reached = max(reached, stop)
    if reached != extent:
        raise _Wrong(f"its parts do not cover it: they end at {reached}, not at {extent}")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{what} must be an object, not {type(value).__name__}")
    return value


def _list(item: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(item.get(key), list):
        raise _Wrong(f"{key} must be a list, not {type(item.get(key)).__name__}")
    return list(item[key])


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value or value == "__metadata__":
        raise _Wrong(f"{key} must be a string, not {str(value)[:80]!r}")
    return value


def _integer(item: dict[str, Any], key: str, low: int, high: int) -> int:
    value = item.get(key)
    if type(value) is not int or not low <= value <= high:
        raise _Wrong(f"{key} must be an integer from {low} to {high}, not {str(value)[:80]}")
    return value
