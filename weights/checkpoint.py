"""One lazy view of a checkpoint, whatever its format.

Nothing is read when a checkpoint is opened but names, shapes and metadata. `Entry.read` then brings
any rectangular part of one tensor as a torch tensor: each rank asks for its own slices alone.

Where a file has quantised weights that products can take, `Entry.quant` brings a part of them as they
are (`weights.quant`).

What is not here: writing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.errors import InputError
from weights.files import folder_format, regular_file
from weights.quant import QuantWeight
from weights.schemes import Scheme

Slices = tuple[slice, ...]
ReadQuant = Callable[[slice, slice], QuantWeight]


@dataclass(frozen=True)
class Entry:
    """One tensor: its full shape, how it is stored, and how to read a part of it.

    `read(slices)` takes one slice (step 1) per dimension and returns a tensor of that part. Stored
    floats keep their dtype, quantised blocks come out as float32. `stored_as` is the dtype in
    safetensors' spelling ("BF16"), or the block format ("Q4_0"); then `block` elements of the last
    dimension are stored together and cannot be cut, and `read_raw(slices)` gives the part as it is
    stored: uint8 [rows, bytes]. `peek` is a `read` whose result may be a view of the file: for who
    copies it at once. `file` holds it, where one of several does.

    A matrix that is quantised by `scheme` is read as such by `quant(rows, columns)`; it raises
    InputError for columns that cut a group below what products take. Of a stack of matrices
    `quant_of(index, rows, columns)` reads one. They are None for others, also for those that can only
    be dequantised.
    """

    shape: tuple[int, ...]
    stored_as: str
    read: Callable[[Slices], Tensor]
    block: int = 1
    read_raw: Callable[[Slices], Tensor] | None = None
    peek: Callable[[Slices], Tensor] | None = None
    file: Path | None = None
    scheme: Scheme | None = None
    quant: ReadQuant | None = None
    quant_of: Callable[[int, slice, slice], QuantWeight] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Names to entries, and what else the file says.

    `config` holds the keys of a Hugging Face `config.json`, or the key-values of a GGUF file (then
    `format` is "gguf"). `folder` is where a tokenizer may lie beside the weights. Entries have
    canonical names (those of Hugging Face's Llama); `stored_names` tells what the file calls them,
    where that differs. `world_size` is how many ranks the files are split for (1: they are whole);
    the entries are whole tensors all the same.
    """

    path: Path
    format: str
    entries: Mapping[str, Entry]
    config: Mapping[str, Any] = field(default_factory=dict)
    stored_names: Mapping[str, str] = field(default_factory=dict)
    world_size: int = 1

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any format that is read: a file, or the folder of a model.

    A folder that holds several is opened in the order of `weights.files.folder_format`. Raises
    InputError for what is missing, damaged, or of a format that is not read.
    """
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return _open_folder(path)
    regular_file(path, "a checkpoint")
    # Imported here: each brings a library that only its own format needs.
    if path.suffix == ".gguf":
        from weights.gguf_io import open_gguf

        return open_gguf(path)
    if path.suffix == ".safetensors":
        from weights.safetensors_io import open_safetensors

        return open_safetensors(path)
    if path.suffix in (".pth", ".bin", ".pt"):
        from weights.meta_io import is_part, open_meta
        from weights.pickle_io import open_pickle

        return open_meta(path) if is_part(path) else open_pickle(path)
    raise InputError(f"{path} is not a checkpoint that Yoke reads; {_READ}")


_READ = (
    "give a .gguf, .safetensors, .pth or .bin file, or the folder of a model: config.json with "
    "safetensors or pytorch_model.bin, or params.json with consolidated.00.pth"
)


def _open_folder(path: Path) -> Checkpoint:
    found = folder_format(path)
    if found is None:
        raise InputError(f"{path} holds no *.safetensors file and no other weights; {_READ}")
    form, files = found
    if form == "yoke":
        from weights.yoke_io import open_yoke

        return open_yoke(path)
    if form == "safetensors":
        from weights.safetensors_io import open_safetensors

        return open_safetensors(path)
    if form == "meta":
        from weights.meta_io import open_meta

        return open_meta(path)
    if form in ("bin", "pth"):
        from weights.pickle_io import open_pickle

        return open_pickle(path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise InputError(
            f"{path} holds {len(files)} .gguf files ({names}); give the path of one of them"
        )
    return open_checkpoint(files[0])


def check_slices(name: str, shape: tuple[int, ...], slices: Slices) -> None:
    """Assert that `slices` lie inside `shape`: slicing past an end would shorten silently."""
    assert len(slices) == len(shape), f"{name}: {len(slices)} slices for shape {shape}"
    for part, size in zip(slices, shape, strict=True):
        assert part.step in (None, 1) and 0 <= part.start <= part.stop <= size, (name, part, size)
