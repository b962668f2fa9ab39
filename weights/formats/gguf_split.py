"""A GGUF model in several files, NAME-00001-of-00003.gguf, as llama.cpp's llama-gguf-split makes them.

The first file has the metadata. Each file has a header of its own, which lists its tensors, its number
(split.no), the number of files (split.count) and of all tensors (split.tensors.count).
What is not here: which files these are (weights.locate).

Source: llama.cpp's `gguf-split.cpp`, and how `llama-model-loader.cpp` reads its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.files import DAMAGE, damaged, regular_file
from weights.formats.gguf_header import FORM, Header, read_header

_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


def read_parts(files: Sequence[Path]) -> tuple[Header, ...]:
    """The headers of a model's files, in order. Raises InputError unless the files are all the parts
    of one model."""
    headers = tuple(_read(file) for file in files)
    if len(files) == 1:
        count = headers[0].values.get(_COUNT, 1)
        if count not in (0, 1):
            raise InputError(
                f"{files[0]} is one of {str(count)[:40]} files ({_COUNT}), but its name does not say "
                "the names of the others; give a file named like NAME-00001-of-00003.gguf with the "
                "others beside it, or the folder of all"
            )
        return headers
    names: dict[str, Path] = {}
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        _check(header, file, _COUNT, len(files))
        _check(header, file, _NUMBER, number)
        for key in ("general.architecture", _TENSORS):
            wanted = headers[0].values.get(key)
            if key in header.values and header.values[key] != wanted:
                raise _not_of_one(
                    file, f"{key} is {_shown(header.values[key])}, but {wanted!r} in the first file"
                )
        for tensor in header.tensors:
            if tensor.name in names:
                raise _not_of_one(file, f"{tensor.name!r} is also in {names[tensor.name].name}")
            names[tensor.name] = file
    total = headers[0].values.get(_TENSORS, len(names))
    if total != len(names):
        raise _not_of_one(
            files[0], f"{_TENSORS} is {_shown(total)}, but the files hold {len(names)} tensors"
        )
    return headers


def _read(file: Path) -> Header:
    regular_file(file, FORM)
    try:
        return read_header(file)
    except InputError:
        raise
    except DAMAGE as error:
        raise damaged(file, FORM, error) from error


def _check(header: Header, file: Path, key: str, wanted: int) -> None:
    found = header.values.get(key)
    if found != wanted:
        raise _not_of_one(file, f"{key} is {_shown(found)}, but {wanted} by the names of the files")


def _not_of_one(file: Path, why: str) -> InputError:
    return InputError(
        f"{file} is not a part of the same model ({why}); copy all files of the model again"
    )


def _shown(value: Any) -> str:
    return repr(value)[:100]
