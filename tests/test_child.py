"""A failed assert in a process that a test started is in that test's failure, with values and place."""

from __future__ import annotations

import pytest

from tests.running import RunRanks, run_case

PLACE = 'tests/targets/wrong.py", line 15, in check'
VALUES = "assert 41 == (42 - 0)"


def test_of_a_rank(run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("wrong", 1)
    assert code == 1
    assert PLACE in err and VALUES in err, err


def test_of_a_forked_rank() -> None:
    with pytest.raises(AssertionError) as failure:
        run_case("wrong", "forked")
    assert PLACE in str(failure.value) and VALUES in str(failure.value)
