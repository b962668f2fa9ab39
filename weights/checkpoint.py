"""One lazy view of a checkpoint, whatever its format.

Nothing is read when a checkpoint is opened but names, shapes and metadata. `Entry.read` then brings
any rectangular part of one tensor as a torch tensor: each rank asks for its own slices alone.

Where a file has quantized weights that products can take, `Entry.quant` brings a part of them as they
are (`weights.quant`).

What is not here: opening one (`weights.open`), writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.quant import QuantWeight
from weights.schemes import Scheme

Slices = tuple[slice, ...]
ReadQuant = Callable[[slice, slice], QuantWeight]


@dataclass(frozen=True)
class Entry:
    """One tensor: its full shape, how it is stored, and how to read a part of it.

    `read(slices)` takes one slice (step 1) per dimension and returns a tensor of that part. Stored
    floats keep their dtype, quantized blocks come out as float32. `stored_as` is the dtype in
    safetensors' spelling ("BF16"), or the block format ("Q4_0"); then `block` elements of the last
    dimension are stored together and cannot be cut, and `read_raw(slices)` gives the part as it is
    stored: uint8 [rows, bytes]. `peek` is a `read` whose result may be a view of the file: for who
    copies it at once. `file` holds it, where one of several does.

    A matrix that is quantized by `scheme` is read as such by `quant(rows, columns)`; it raises
    InputError for columns that cut a group below what products take. Of a stack of matrices
    `quant_of(index, rows, columns)` reads one. They are None for others, also for those that can only
    be dequantized.
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
    `format` is "gguf"). `beside` is the folder of config and tokenizer, where that is not
    the folder of `path`. Entries have
    canonical names (those of Hugging Face's Llama); `stored_names` tells what the file calls them,
    where that differs. `world_size` is how many ranks the files are split for (1: they are whole);
    the entries are whole tensors all the same. `files` hold the weights. `absent` tells of canonical
    names that are no entries, though index or files speak of them, why they are none; `notes` are
    lines for the user about what was left out.
    """

    path: Path
    format: str
    entries: Mapping[str, Entry]
    config: Mapping[str, Any] = field(default_factory=dict)
    stored_names: Mapping[str, str] = field(default_factory=dict)
    world_size: int = 1
    beside: Path | None = None
    files: tuple[Path, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where config and tokenizer are."""
        return self.beside or (self.path if self.path.is_dir() else self.path.parent)


def check_slices(name: str, shape: tuple[int, ...], slices: Slices) -> None:
    """Assert that `slices` lie inside `shape`: slicing past an end would shorten silently."""
    assert len(slices) == len(shape), f"{name}: {len(slices)} slices for shape {shape}"
    for part, size in zip(slices, shape, strict=True):
        assert part.step in (None, 1) and 0 <= part.start <= part.stop <= size, (name, part, size)
