"""The collectives between real processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shared_memory_is_exact(size: int, run_ranks: Callable) -> None:
    code, _, err = run_ranks("collectives", size, "shm")
    assert code == 0, err


def test_gloo_gives_the_same_sums(run_ranks: Callable) -> None:
    code, _, err = run_ranks("collectives", 2, "gloo")
    assert code == 0, err


def test_torch_accepts_the_operators_and_compiles_them(run_ranks: Callable) -> None:
    code, _, err = run_ranks("traced", 2, "shm")
    assert code == 0, err


@pytest.mark.parametrize("case", ["join", "late"])
def test_a_rank_that_does_not_come_is_named(case: str, run_ranks: Callable) -> None:
    code, out, err = run_ranks("timeouts", 3, "shm", case=case)
    assert code == 0, err
    assert f"rank 0 waited {'2.5' if case == 'join' else '1.5'} s for rank 1" in out
    assert ("pid" in out) == (case == "late")
    # While the ranks gather, the segment has a name, and nobody else may open it.
    assert ("[rank 1] ['mode 600']" in out) == (case == "join")
    assert "[rank 2]" in out


def test_ranks_that_call_different_things_are_told(run_ranks: Callable) -> None:
    code, out, err = run_ranks("timeouts", 2, "shm", case="mismatch")
    assert code == 0, err
    assert "rank 0 is in operator 1 with 8 elements" in out
    assert "rank 1 in operator 1 with 9 elements" in out


def test_without_a_compiler_gloo_takes_over(
    run_ranks: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    code, _, err = run_ranks("fallback", 2, "shm")
    assert code == 0, err
    assert err.count("using gloo, which is slower") == 1
    assert "/nonexistent/compiler" in err
