"""Meta's releases: `consolidated.NN.pth` with `params.json`; model-parallel parts as whole tensors.

Each file holds the part of one rank: some rows of each column-parallel weight, some columns of each
row-parallel weight, and a copy of each norm. A slice of a whole tensor reads only the files that it
overlaps. Llama 1 and 2 split the embedding by columns, Llama 3 by rows; the shapes show which.

Source: the ParallelEmbedding, ColumnParallelLinear and RowParallelLinear of Meta's `model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.checkpoint import Checkpoint, Entry
from weights.files import read_json
from weights.formats.folder import assemble
from weights.formats.params import EMBEDDING, count
from weights.formats.pickle_io import stored_entries
from weights.locate import Source
from weights.views import concat, replicated

_BY_ROWS = re.compile(r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])\.weight|output\.weight")
_BY_COLUMNS = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")
_COPIED = re.compile(r"(layers\.\d+\.(attention_norm|ffn_norm)|norm)\.weight|rope\.freqs")


def open_meta(source: Source) -> Checkpoint:
    """Open all parts, with the `params.json` beside them. Raises InputError."""
    folder, files = source.folder, source.files
    numbers = [int(file.name.split(".")[1]) for file in files]
    if numbers != list(range(len(files))):
        missing = next(i for i in range(len(files)) if i not in numbers)
        raise InputError(
            f"{folder} has {len(files)} files consolidated.NN.pth, but consolidated.{missing:02}.pth "
            "is missing; copy all parts of the model into the folder"
        )
    params = read_json(folder / "params.json")
    dim = count(params, "dim", folder / "params.json")
    parts = [stored_entries(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        odd = sorted(part.keys() ^ parts[0].keys())
        if odd:
            raise InputError(
                f"{file} and {files[0].name} do not hold the same tensors: only one has {odd[0]!r}; "
                "they are not parts of one model: download it again"
            )
    stored = {name: _joined(folder, name, [part[name] for part in parts], dim) for name in parts[0]}
    _check_heads(folder, params, stored)
    return replace(assemble(source, stored), world_size=len(files))


def _joined(folder: Path, name: str, parts: list[Entry], dim: int) -> Entry:
    """The whole tensor from its parts. Raises InputError if the parts do not fit together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    alike = all((part.shape, part.stored_as) == (first.shape, first.stored_as) for part in parts)
    rank = 1 if _COPIED.fullmatch(name) else 2
    if not alike or len(first.shape) != rank:
        shapes = [(part.shape, part.stored_as) for part in parts]
        raise InputError(
            f"{folder}: {name!r} has the shapes {str(shapes)[:200]} in the {len(parts)} files; "
            f"the parts must have equal shapes of {rank} dimensions: download the model again"
        )
    if rank == 1:
        return replicated(folder, name, parts)
    if _BY_ROWS.fullmatch(name):
        return concat(parts, 0)
    if _BY_COLUMNS.fullmatch(name):
        return concat(parts, 1)
    if name == EMBEDDING:
        if first.shape[1] == dim:
            return concat(parts, 0)
        if first.shape[1] * len(parts) == dim:
            return concat(parts, 1)
        raise InputError(
            f"{folder}: {name!r} has {first.shape[1]} columns in each of {len(parts)} files, which is "
            f"neither dim={dim} of params.json nor a part of it; the files and params.json must belong "
            "to one model"
        )
    raise InputError(
        f"{folder} holds an unknown tensor {name!r}: Yoke does not know how it is split over "
        f"{len(parts)} files"
    )


def _check_heads(folder: Path, params: Mapping[str, Any], stored: Mapping[str, Entry]) -> None:
    """Raise InputError unless query and key rows fit the heads that params.json declares: rows are
    reordered head by head, and a wrong number of heads would silently reorder them wrongly."""
    source = folder / "params.json"
    num_heads = count(params, "n_heads", source)
    num_kv = count(params, "n_kv_heads", source, num_heads)
    dim = count(params, "dim", source)
    head_dim = params.get("head_dim")
    if head_dim is None:
        head_dim = dim // num_heads
    for letter, heads in (("q", num_heads), ("k", num_kv)):
        name = f"layers.0.attention.w{letter}.weight"
        entry = stored.get(name)
        if entry is not None and entry.shape[:1] != (heads * head_dim,):
            raise InputError(
                f"{folder}: {name!r} has shape {entry.shape}, params.json declares {heads} heads of "
                f"{head_dim} rows; the files and params.json are of different models"
            )
