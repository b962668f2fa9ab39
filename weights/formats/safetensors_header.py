"""The header of a safetensors file, with the checks that need no tensors. Free of torch.

A file is eight bytes of length, a JSON header of that length, and the tensors' bytes.

What is not here: whether lengths and shapes agree, and the tensors (weights.formats.safetensors_io).

Source: the format's description in the README of the safetensors project.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from weights.files import HEADER_LIMIT, parse_json, regular_file

FORM = "safetensors"


def read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header's entry of each tensor, by name; the offset of the tensors' bytes; and the file's
    size in bytes. Raises InputError or one of files.DAMAGE."""
    size = regular_file(file, FORM)
    with file.open("rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0] if size >= 8 else size
        if length > min(size - 8, HEADER_LIMIT):
            raise ValueError(f"its header has {length} bytes in a file of {size}")
        header = parse_json(opened.read(length), unique=True)
    if not isinstance(header, dict):
        raise ValueError(f"its header is of type {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, 8 + length, size
