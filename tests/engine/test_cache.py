"""What was compiled is kept: the next start of the same job finds it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest


@pytest.mark.slow
def test_compiled_collectives_are_found_again(run_ranks: Callable) -> None:
    number = random.random()  # so that nobody has compiled this step before
    for _ in range(2):  # in the first, one rank may find what the other has just made
        code, out, err = run_ranks("cached", 2, "shm", number=number)
        assert code == 0, err
    assert [line.partition("hits")[2] for line in out.splitlines()] == [" 1 bypasses 0"] * 2
