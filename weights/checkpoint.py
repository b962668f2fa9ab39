"""One lazy view of a checkpoint, whatever its format.

Opening a checkpoint reads only names, shapes and metadata. `Entry.read` then returns any rectangular
part of one tensor as a torch tensor, so each rank reads only its own slices.

Where a file stores quantized weights that the kernels support, `Entry.quant` returns a part of them
still quantized (`weights.quant`).

What is not here: opening a checkpoint (`weights.open`), and writing one.
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
StoredIn = Callable[[Slices], list[tuple[str, Slices]]]


@dataclass(frozen=True)
class Entry:
    """One tensor: its full shape, how it is stored, and how to read a part of it.

    `read(slices)` takes one slice (step 1) per dimension and returns a tensor of that part. Stored
    floats keep their dtype; quantized blocks are dequantized to float32. `stored_as` is the dtype in
    safetensors' spelling ("BF16") or the block format ("Q4_0"). In a block format, `block` elements of
    the last dimension are stored together and cannot be split, and `read_raw(slices)` returns the
    stored bytes of the part: uint8 [rows, bytes]. `peek` is a `read` whose result may be a view of the
    file: use it only if you copy the result at once. `file` is the file that holds the tensor, if the
    checkpoint has several.

    If a matrix is quantized by `scheme`, `quant(rows, columns)` reads it without dequantizing; it
    raises InputError for columns that would cut a group into pieces smaller than the kernels support.
    For a stack of matrices, `quant_of(index, rows, columns)` reads one of them. These fields are None
    for all other tensors, including those that can only be dequantized.

    If a weight is stored as several tensors (codes, scales), `stored_in(slices)` names those among
    `Checkpoint.stored` that hold a part of it, each with the slices of it that do: all stored elements
    that the part touches, so the slices of neighboring parts may overlap. It reads nothing.
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
    stored_in: StoredIn | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A mapping of names to entries, with the metadata of the files.

    `config` holds the keys of a Hugging Face `config.json`, or the key-values of a GGUF file (then
    `format` is "gguf"). `beside` is the folder of config and tokenizer, if that is not the folder of
    `path`. Entries have canonical names (those of Hugging Face's Llama); `stored_names` maps a
    canonical name to the name in the file where the two differ. `world_size` is the number of ranks
    that the files are split for (1: not split); entries are whole tensors in either case. `files`
    hold the weights. `absent` maps canonical names that an index or a file mentions, but that are not
    entries, to the reason. `notes` are lines for the user about what was left out. `stored`: the
    tensors of weights that are stored as several, by stored name; see `Entry.stored_in`.
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
    stored: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of config and tokenizer."""
        return self.beside or (self.path if self.path.is_dir() else self.path.parent)


def check_slices(name: str, shape: tuple[int, ...], slices: Slices) -> None:
    """Assert that `slices` lie inside `shape`: a slice past the end would be shortened silently."""
    assert len(slices) == len(shape), f"{name}: {len(slices)} slices for shape {shape}"
    for part, size in zip(slices, shape, strict=True):
        assert part.step in (None, 1) and 0 <= part.start <= part.stop <= size, (name, part, size)
