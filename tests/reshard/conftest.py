"""Where the tests of reshard write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory where there is one: what is measured here is not the disk's fsync."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="reshard-", dir=where) as folder:
        yield Path(folder)
