"""What the tests of hostile files share."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.weights.samples import llama


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Room for 2 GiB more than this process has mapped: a header that is believed fails here."""
    llama()  # what it loads is not the files' doing
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
