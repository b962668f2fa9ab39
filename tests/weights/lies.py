"""Opening a file that lies, and what must come of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import InputError
from weights.open import open_checkpoint


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for entry in checkpoint.entries.values():
        entry.read(tuple(slice(0, size) for size in entry.shape))


def refused(path: Path, pattern: str, names: Path | None = None) -> None:
    """Opening `path` (and reading all there is) must be refused, in words that name the file."""
    with pytest.raises(InputError, match=pattern) as caught:
        read_all(path)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert (names or path).name in message, message
    assert len(message) < 1000 and "\n" not in message
    if "MemoryError" in message:
        raise AssertionError(f"a claimed size was believed: {message}")


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
