"""What was compiled is kept: the next start of the same job finds it."""

from __future__ import annotations

import random
import re

import pytest

from tests.running import RunRanks


@pytest.mark.slow
def test_compiled_collectives_are_found_again(run_ranks: RunRanks) -> None:
    number = random.random()  # so that nobody has compiled this step before
    for _ in range(2):  # in the first, one rank may find what the other has just made
        code, out, err = run_ranks("cached", 2, "shm", number=number)
        assert code == 0, err
    # Not by lines: two ranks that write at once may share one.
    assert re.findall(r"hits (\d+) bypasses (\d+)", out) == [("1", "0")] * 2, out
