"""Asserts that fail in a rank of the launcher's, and in a rank that is forked."""

from __future__ import annotations

from base.rank_settings import RankSettings


def main(env: RankSettings, payload: str) -> int:
    check(env.rank)
    return 0


def check(rank: int) -> None:
    found = {"rank": rank, "sum": 41 + rank}
    assert found["sum"] == 42 - rank, "sums differ"


def forked() -> None:
    from tests.targets.forking import run_forked

    run_forked(1, lambda rank, report: check(rank))


CASES = {"forked": forked}
