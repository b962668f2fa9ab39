"""Groups over several machines: shared memory inside each, gloo between their leaders."""

from __future__ import annotations

import pytest

from tests.running import RunRanks


@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 0, 0, 2), (0, 1, 0), (5, 5)])
def test_ranks_by_machine(nodes: tuple[int, ...], run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("machines", len(nodes), "gloo", nodes=nodes, compile=nodes == (0, 1, 0))
    assert code == 0, err
