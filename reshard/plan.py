"""The plan of a resharding: which part of which tensor goes into which file. Pure functions.

Shards are the loader's own (`tp.shard`), so a rank's file holds what the rank would have sliced from
the whole checkpoint. There are two output formats: Yoke's, with one file per rank and a manifest
(`weights.formats.yoke_manifest`), and for one rank a plain Hugging Face folder with the original tensor
names.

Quantized tensors are copied as they are stored, never quantized again. A border between ranks may be
inside a block or a group: both neighbors then hold all of it, and on the way back the copies are
compared and written once. Weights that are stored as several tensors: `reshard.stored`.

What is not here: reading and writing (`reshard.run`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from base.errors import InputError
from reshard.stored import stored_tensors
from tp.shard import Dims, Layout, find_spec, plan_layout, slices_of
from weights.checkpoint import Checkpoint, Entry
from weights.formats.gguf_names import same_for_all_layers
from weights.formats.quant_config import KEYS as QUANT_KEYS
from weights.formats.yoke_manifest import (
    Blocks,
    Manifest,
    Part,
    StoredTensor,
    block_sizes,
    file_contents,
    rank_file,
)
from weights.names import translate
from weights.writer import DTYPES, Tensors, num_bytes

SHARD_BYTES = 5 * 10**9  # the most in one file of a Hugging Face folder, as in their library
INDEX = "model.safetensors.index.json"
_NUM_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor along its sharded dimension: `ranges` of [start, stop), one after the other,
    each in whole blocks."""

    tensor: StoredTensor
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Output:
    """One tensor of one file: its name there, and the pieces that are concatenated into it."""

    file: str
    name: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ReshardPlan:
    """What to write. `form` is "yoke" or "hf". `outputs` are in writing order, by tensor and then by
    rank, so that the source is read from front to back. `config` is the result's; `kept` names how the
    tensors are quantized that are copied unchanged. `texts`: small files to write, by name."""

    form: str
    world_size: int
    dims: Dims
    source_format: str
    config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]
    files: Mapping[str, Tensors]
    outputs: tuple[Output, ...]
    kept: tuple[str, ...]
    texts: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        return sum(file.file_bytes for file in self.files.values())


def plan_reshard(
    checkpoint: Checkpoint, world_size: int, *, num_heads: int | None = None, dequantize: bool = False
) -> ReshardPlan:
    """Plan resharding to `world_size` ranks. Raises InputError if the checkpoint cannot be sharded so.

    `num_heads` is the number of query heads; None reads it from the checkpoint's configuration.
    """
    if world_size < 1:
        raise InputError(f"--to {world_size}: there must be at least one rank")
    dims = dims_of(checkpoint, num_heads)
    layouts = [plan_layout(dims, rank, world_size) for rank in range(world_size)]
    # GGUF metadata is not a config.json, so a GGUF model gets Yoke's format even for one rank.
    form = "hf" if world_size == 1 and checkpoint.format != "gguf" else "yoke"
    tensors, kept = _tensors(checkpoint, layouts, dequantize)
    if form == "hf":
        outputs = _hf_outputs(tensors, checkpoint.format, dims)
    else:
        outputs = tuple(
            Output(rank_file(part.rank, world_size), tensor.name, (Piece(tensor, part.ranges),))
            for tensor in tensors
            for part in tensor.parts
        )
    files = (
        hf_files(_hf_shapes(outputs), SHARD_BYTES)
        if form == "hf"
        else {
            rank_file(rank, world_size): file_contents(tensors, rank, world_size)
            for rank in range(world_size)
        }
    )
    places = {name: file for file, contents in files.items() for name in contents.shapes}
    config = checkpoint.config
    if dequantize and checkpoint.stored:
        config = {key: value for key, value in config.items() if key not in QUANT_KEYS}
    texts: dict[str, str] = {}
    if form == "hf":
        outputs = tuple(replace(output, file=places[output.name]) for output in outputs)
        texts["config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        if len(files) > 1:
            total = sum(contents.data_bytes for contents in files.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return ReshardPlan(
        form,
        world_size,
        dims,
        checkpoint.format,
        config,
        tensors,
        files,
        outputs,
        kept,
        texts,
    )


def _tensors(
    checkpoint: Checkpoint, layouts: list[Layout], dequantize: bool
) -> tuple[tuple[StoredTensor, ...], tuple[str, ...]]:
    """What is stored, and the formats of what stays quantized. Raises InputError."""
    plain = checkpoint.entries
    several: dict[str, Entry] = {}
    if not dequantize:
        several = {name: entry for name, entry in plain.items() if entry.stored_in is not None}
    tensors = (
        *(
            _tensor(name, entry, checkpoint, layouts, dequantize)
            for name, entry in plain.items()
            if name not in several
        ),
        *stored_tensors(several, checkpoint.stored, layouts),
    )
    _check_names(checkpoint, tensors)
    kept = {tensor.blocks.format for tensor in tensors if tensor.blocks is not None}
    kept |= {entry.stored_as for entry in several.values()}
    return tensors, tuple(sorted(kept))


def manifest_of(plan: ReshardPlan, digests: Mapping[tuple[str, str], str]) -> Manifest:
    """The manifest of the written files; `digests` maps (file, tensor name) to a digest."""
    ranks = plan.world_size
    tensors = tuple(
        replace(
            tensor,
            parts=tuple(
                replace(part, digest=digests[rank_file(part.rank, ranks), tensor.name])
                for part in tensor.parts
            ),
        )
        for tensor in plan.tensors
    )
    sizes = tuple(plan.files[rank_file(rank, ranks)].file_bytes for rank in range(ranks))
    dims = plan.dims
    return Manifest(
        ranks,
        dims.num_heads,
        dims.num_kv_heads,
        dims.head_dim,
        plan.source_format,
        plan.config,
        tensors,
        sizes,
    )


def dims_of(checkpoint: Checkpoint, num_heads: int | None = None) -> Dims:
    """The sizes of a model, from its tensors' shapes. Only the number of query heads, which shapes do
    not show, is `num_heads` or from the configuration. Raises InputError if they are inconsistent."""
    extents: dict[str, tuple[int, str]] = {}
    for name, entry in checkpoint.entries.items():
        spec = find_spec(name)
        if spec.dim is None:
            continue
        if spec.dim >= len(entry.shape):
            raise InputError(
                f"{name} has shape {entry.shape}, but is sharded along dimension {spec.dim}; "
                "is the file damaged?"
            )
        size = entry.shape[spec.dim]
        known, first = extents.setdefault(spec.axis, (size, name))
        if size != known:
            raise InputError(
                f"{name} has {size} elements along {spec.axis!r} and {first} has {known}: in one "
                "model these are equal; is a file of another model among them?"
            )
    mlp = "expert" if "expert" in extents else "ffn"
    for axis in ("q", "kv", mlp, "vocab"):
        if axis not in extents:
            raise InputError(
                f"{checkpoint.path} has no weight that is sharded along {axis!r}; every model has one: "
                "is a file missing?"
            )
    if num_heads is None:
        num_heads = _find_num_heads(checkpoint)
    q, kv = extents["q"][0], extents["kv"][0]
    if q % num_heads:
        raise InputError(
            f"{extents['q'][1]} has {q} rows, which are not {num_heads} heads of one size; is the "
            "configuration another model's?"
        )
    head_dim = q // num_heads
    if kv % head_dim or num_heads % (kv // head_dim):
        raise InputError(
            f"{extents['kv'][1]} has {kv} rows, which are not whole KV heads of {head_dim} rows that "
            f"{num_heads} query heads share evenly"
        )
    ffn, expert = (extents.get(axis, (0, ""))[0] for axis in ("ffn", "expert"))
    return Dims(num_heads, kv // head_dim, head_dim, ffn, extents["vocab"][0], expert)


def _find_num_heads(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    architecture = config.get("general.architecture")
    for key in (*_NUM_HEADS, f"{architecture}.attention.head_count"):
        if key in config:
            value = same_for_all_layers(config, key, checkpoint.path)
            if type(value) is not int or value < 1:
                raise InputError(f"{checkpoint.path}: {key} must be a positive integer, not {value!r}")
            return int(value)
    raise InputError(
        f"{checkpoint.path}: its configuration does not have the number of query heads "
        f"({', '.join(_NUM_HEADS)}); put the model's config.json beside the weights"
    )


def _check_names(checkpoint: Checkpoint, tensors: tuple[StoredTensor, ...]) -> None:
    """Raise InputError if two tensors would have one name in a file."""
    counts = Counter(tensor.name for tensor in tensors)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise InputError(
            f"{checkpoint.path} stores {twice!r} both as a weight and as a tensor of a quantized "
            "weight; remove the files that do not belong to the model, or use --dequantize"
        )


def _tensor(
    name: str, entry: Entry, checkpoint: Checkpoint, layouts: list[Layout], dequantize: bool
) -> StoredTensor:
    spec = find_spec(name)
    stored_name = checkpoint.stored_names.get(name, name)
    dtype, blocks = _storage(name, entry, dequantize)
    if len(layouts) == 1 and checkpoint.format != "gguf" and blocks is not None:
        raise InputError(
            f"{name} is quantized ({blocks.format}), which a Hugging Face folder cannot hold; "
            "--dequantize writes it as bf16"
        )
    if 0 in entry.shape:
        raise InputError(f"{name} has shape {entry.shape}, so it is empty; is the file damaged?")
    whole = StoredTensor(name, stored_name, dtype, entry.shape, spec.dim, spec.axis, (), blocks)
    if spec.dim is None:
        ranks = range(1 if spec.axis == "first" else len(layouts))
        return replace(whole, parts=tuple(Part(rank, ((0, whole.extent),)) for rank in ranks))
    parts = []
    for rank, layout in enumerate(layouts):
        bounds = slices_of(name, entry.shape, layout)[spec.dim]
        if bounds.start < bounds.stop:  # of a small vocabulary, the last ranks may hold nothing
            parts.append(Part(rank, ((bounds.start, bounds.stop),)))
    # The parts must cover the tensor; otherwise the manifest's reader would refuse it later.
    assert parts[0].start == 0 and parts[-1].stop == whole.extent, (name, parts)
    assert all(left.stop >= right.start for left, right in pairwise(parts)), (name, parts)
    return replace(whole, parts=tuple(parts))


def _storage(name: str, entry: Entry, dequantize: bool) -> tuple[str, Blocks | None]:
    """The dtype to write, and the blocks if the tensor stays quantized."""
    if entry.stored_as in DTYPES and entry.block == 1:
        return entry.stored_as, None
    if dequantize:
        return "BF16", None
    sizes = block_sizes(entry.stored_as)
    if entry.read_raw is None or sizes is None or sizes[0] != entry.block:
        raise InputError(
            f"{name} is stored as {entry.stored_as}, which cannot be copied as it is stored; "
            "--dequantize writes it as bf16"
        )
    return "U8", Blocks(entry.stored_as, *sizes)


def _hf_outputs(
    tensors: tuple[StoredTensor, ...], source_format: str, dims: Dims
) -> tuple[Output, ...]:
    """The tensors under their names in Hugging Face's files. Those of weights that are stored as
    several have kept their names, their shapes and the order of their rows.

    Several tensors with one such name were one fused tensor and are fused again, in their order: whole
    tensors concatenated, or (Falcon) the rows of one KV head after the other, each preceded by the rows
    of its query heads.
    """
    # Stored names whose rows are in another order (Meta's) would be wrong for the rows written here.
    kept = tuple(
        Output("", tensor.name, (Piece(tensor, ((0, tensor.extent),)),))
        for tensor in tensors
        if tensor.is_stored
    )
    tensors = tuple(tensor for tensor in tensors if not tensor.is_stored)
    stored = {tensor.stored_name for tensor in tensors}
    known = source_format != "gguf" and not any(
        piece.interleaved for name in stored for piece in translate(name)
    )
    together: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        together.setdefault(tensor.stored_name if known else tensor.name, []).append(tensor)
    for name, parts in together.items():
        if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
            raise InputError(
                f"{name} is to be fused of tensors that differ in dtype or row shape: "
                f"{parts[0].name}, ..."
            )

    def pieces(name: str, parts: list[StoredTensor]) -> tuple[Piece, ...]:
        grouped = known and any(piece.grouped for piece in translate(name))
        groups = dims.num_kv_heads if grouped else 1
        return tuple(
            Piece(part, ((part.extent * i // groups, part.extent * (i + 1) // groups),))
            for i in range(groups)
            for part in parts
        )

    fused = tuple(Output("", name, pieces(name, parts)) for name, parts in together.items())
    return (*fused, *kept)


def _hf_shapes(outputs: tuple[Output, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The (dtype, shape) of each tensor of the Hugging Face folder, by name."""
    shapes = {}
    for output in outputs:
        first = output.pieces[0].tensor
        shape = first.shape
        if len(output.pieces) > 1:
            rows = sum(stop - start for piece in output.pieces for start, stop in piece.ranges)
            shape = (rows, *shape[1:])
        shapes[output.name] = (first.dtype, shape)
    return shapes


def hf_files(shapes: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> dict[str, Tensors]:
    """Distribute tensors (dtype in safetensors' spelling, shape) over files as Hugging Face does: in
    order, with a new file where the current one would exceed `shard_bytes`."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = []
    filled = 0
    for name, (dtype, shape) in shapes.items():
        size = num_bytes(dtype, shape)
        if not shards or filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += size
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    return {name: Tensors(shapes, {"format": "pt"}) for name, shapes in zip(names, shards, strict=True)}
