"""Checks of untrusted files: what kind of file a path is, and JSON that may be hostile.

Every reader calls these functions first. So a FIFO, a directory, a loop of links or a corrupt header
becomes one clear message (InputError), and never a hang, a crash or an allocation of a size that the
file claims. Free of torch: the command line checks files before any rank starts.

What is not here: which files make up a checkpoint (weights.locate); the formats themselves.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.texts import without_mark

# What reading a damaged file may raise, in this code and in libraries. The open function of each format
# turns these into one InputError that names the file. (InputError is a ValueError: re-raise it first.)
DAMAGE = (
    ValueError,
    LookupError,
    OSError,
    MemoryError,
    OverflowError,
    TypeError,
    EOFError,
    RuntimeError,  # also RecursionError and NotImplementedError
    struct.error,
)

HEADER_LIMIT = 64 << 20  # bytes of JSON; the largest tokenizer.json known to us has 35 MB
CONTAINER_LIMIT = 2_000_000  # lists and objects in JSON; in memory each takes 50 times its bytes
_DIGITS = 40  # no number in a model's files is longer; some tokenizers write 10**30 for "no limit"


def damaged(path: Path, form: str, why: object) -> InputError:
    """The error for a file that is not of the format that its name says."""
    reason = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
    return InputError(
        f"{path} cannot be read as {form} ({reason}); it may be truncated or damaged: copy it again"
    )


def regular_file(path: Path, form: str) -> int:
    """The size in bytes of the file at `path`. Raises InputError unless it is a readable regular file
    that is not empty. `form` is the expected format, for the message."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        what = f"{path} is a link to a file that" if os.path.islink(path) else path
        raise InputError(f"{what} does not exist; give the path of a file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{str(path)!r} cannot be read as {form} ({reason}); give the path of a file"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise InputError(f"{path} cannot be read as {form} (it is {kind}); give the path of a file")
    if not os.access(path, os.R_OK):
        raise InputError(
            f"{path} cannot be read as {form} (permission denied); check its owner and mode"
        )
    if status.st_size == 0:
        raise damaged(path, form, "it is empty")
    return status.st_size


def check_overlaps(ranges: list[tuple[int, int, str]]) -> None:
    """Raise ValueError if two of the ranges (start, stop, name) share a byte."""
    for (_, stop, first), (start, _, second) in pairwise(sorted(ranges)):
        if start < stop:
            raise ValueError(f"{first!r} and {second!r} overlap")


def parse_json(content: bytes, unique: bool = False) -> Any:
    """Parse a JSON value. Raises ValueError for invalid JSON, for integers of more than 40 digits, for
    too many containers and for nesting that is too deep. NaN and infinities are accepted, because
    Python writes them into keys that are not used here: code that uses a number must check it. `unique`
    also rejects a name that occurs twice in one object (Python alone would keep the last)."""

    def integer(text: str) -> int:
        if len(text) > _DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if unique and len(found) != len(items):
            counts = Counter(name for name, _ in items)
            twice = next(name for name in found if counts[name] > 1)
            raise ValueError(f"the name {twice[:200]!r} occurs twice")
        return found

    containers = content.count(b"[") + content.count(b"{")
    if containers > CONTAINER_LIMIT:
        raise ValueError(f"it has {containers} lists and objects, more than {CONTAINER_LIMIT}")
    try:
        return json.loads(
            content.decode("utf-8"),
            parse_int=integer,
            object_pairs_hook=pairs,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if it is not valid JSON or not an object."""
    size = regular_file(path, "JSON")
    if size > HEADER_LIMIT:
        raise InputError(f"{path} has {size} bytes; JSON files may have at most {HEADER_LIMIT} bytes")
    try:
        content = parse_json(without_mark(path.read_bytes()), unique)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
