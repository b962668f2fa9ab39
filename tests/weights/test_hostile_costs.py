"""No file costs more than seconds and its own size, whatever it claims: `hostile_files` has them.

Processor time is asked and not the clock, so that other work on the machine changes little.
"""

from __future__ import annotations

import pytest

from tests.weights.hostile_files import CASES, cost_of


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_before_it_costs_much(name: str) -> None:
    cost = cost_of(CASES[name])
    assert cost.said, "it was not refused"
    assert cost.bearable, cost
