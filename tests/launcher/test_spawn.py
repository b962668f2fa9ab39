"""Real ranks that end in every way there is. (What a signal does to a whole run: engine/test_stop.)"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher.spawn import RunOptions


def test_ranks_are_bound_and_told_their_place(run_ranks: Callable) -> None:
    code, out, err = run_ranks("endings", 2, case="place")
    assert code == 0, err
    assert "rank 0 of 2" in out
    assert "[rank 1] rank 1 of 2" in out


def test_a_mistake_is_told_once_and_ends_with_2(run_ranks: Callable) -> None:
    code, _, err = run_ranks("endings", 3, case="mistake")
    assert code == 2
    assert err.strip() == "error: the value is wrong"


def test_an_exception_is_shown_once_with_its_rank(run_ranks: Callable) -> None:
    code, _, err = run_ranks("endings", 2, case="exception")
    assert code == 1
    assert err.count("ZeroDivisionError") == 1
    assert "rank 1 (pid" in err


def test_exit_codes_of_ranks_are_kept(run_ranks: Callable) -> None:
    code, _, err = run_ranks("endings", 2, case="code")
    assert code == 7
    assert "rank 1" in err


def test_a_rank_that_ends_early_is_an_error_that_names_the_others(run_ranks: Callable) -> None:
    code, _, err = run_ranks("endings", 2, case="early", options=RunOptions(grace_s=1.0))
    assert code == 1
    assert "rank 1 (pid" in err
    assert "not: rank 0 (pid" in err


def test_a_rank_that_ignores_the_request_is_killed(run_ranks: Callable) -> None:
    start = time.monotonic()
    code, _, err = run_ranks("endings", 2, case="stubborn", options=RunOptions(grace_s=1.0))
    assert code == 7, err
    assert time.monotonic() - start < 20


def test_what_a_rank_started_goes_with_it(run_ranks: Callable, tmp_path: Path) -> None:
    code, _, err = run_ranks("endings", 2, case="grandchild", folder=str(tmp_path))
    assert code == 0, err
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


def test_what_the_user_set_is_kept(run_ranks: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code, out, err = run_ranks("endings", 1, case="place")
    assert code == 0, err
    assert "OMP_NUM_THREADS=3" in out
    assert "OMP_NUM_THREADS=3 is kept" in err


def test_starts_in_a_row_leave_nothing_open(run_ranks: Callable) -> None:
    run_ranks("endings", 1, case="code")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run_ranks("endings", 2, case="code")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not psutil.Process().children()
