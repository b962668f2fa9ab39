"""Safetensors, as one file or as Hugging Face's sharded folder with an index.

Hugging Face's names are the canonical ones, so nothing is renamed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.checkpoint import Checkpoint, Entry, Slices, check_slices
from weights.errors import InputError


def open_safetensors(path: Path) -> Checkpoint:
    """Open one `.safetensors` file, or a folder with `config.json`. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    files = _files(path)
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            opened = safe_open(str(file), framework="pt")
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in entries:
                    raise InputError(f"{name} is stored twice, the second time in {file}")
                part = opened.get_slice(name)
                entries[name] = _entry(name, opened, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} cannot be read as safetensors ({error}); it may be truncated: copy it again"
            ) from error
    return Checkpoint(path, "safetensors", entries, read_json(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise InputError(f"{path} holds no *.safetensors file")
        return files
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} must map tensor names to file names under 'weight_map'")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise InputError(f"{index} names {name!r}: shards must lie beside their index")
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing, although {index.name} names it")
        files.append(path / name)
    return files


def _entry(name: str, opened: safe_open, shape: tuple[int, ...], dtype: str) -> Entry:
    def read(slices: Slices) -> Tensor:
        check_slices(name, shape, slices)
        if not shape:
            return opened.get_tensor(name)
        # One slice per dimension, so that the library copies this part and no more.
        part: Tensor = opened.get_slice(name)[slices]
        return part

    return Entry(shape, dtype, read)
