"""Real ranks that end in every way there is. (What a signal does to a whole run: engine/test_stop.)"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.flags import parse_flags
from launcher.spawn import RunOptions
from tests.running import CHECKOUT, RunRanks


def test_ranks_are_bound_and_told_their_place(run_ranks: RunRanks) -> None:
    code, out, err = run_ranks("endings", 2, case="place")
    assert code == 0, err
    assert "rank 0 of 2" in out
    assert "[rank 1] rank 1 of 2" in out


def test_a_mistake_is_told_once_and_ends_with_2(run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("endings", 3, case="mistake")
    assert code == 2
    assert err.strip() == "error: the value is wrong"


def test_a_mistake_has_a_traceback_where_it_is_asked_for(run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("endings", 3, case="mistake", options=RunOptions(tracebacks=True))
    assert code == 2
    assert err.startswith("Traceback") and err.endswith("\nerror: the value is wrong\n")
    assert err.count("Traceback") == 1
    assert parse_flags(["--traceback", "plan"]).options.tracebacks
    assert not parse_flags(["plan"]).options.tracebacks


@pytest.mark.parametrize(
    ("before", "comm", "words"),
    [
        (["-m", "sh", "-c", 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"', "sh"], "auto",
         ["/dev/shm cannot be written to", "--comm gloo"]),
        (["-n"], "gloo", ["127.0.0.1", "loopback", "--comm shm"]),
    ],
)  # fmt: skip
def test_where_ranks_cannot_meet_is_said_before_they_start(
    before: list[str], comm: str, words: list[str]
) -> None:
    command = ["unshare", *before]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("this user may not have a namespace of its own")
    command += [sys.executable, str(CHECKOUT / "launch.py"), "--ranks", "2", "--comm", comm]
    command += ["model=tiny", "weights=random", "prompt=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)


def test_an_exception_is_shown_once_with_its_rank(run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("endings", 2, case="exception")
    assert code == 1
    assert err.count("ZeroDivisionError") == 1
    assert "rank 1 (pid" in err


def test_exit_codes_of_ranks_are_kept(run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("endings", 2, case="code")
    assert code == 7
    assert "rank 1" in err


def test_a_rank_that_ends_early_is_an_error_that_names_the_others(run_ranks: RunRanks) -> None:
    code, _, err = run_ranks("endings", 2, case="early", options=RunOptions(grace_s=1.0))
    assert code == 1
    assert "rank 1 (pid" in err
    assert "running: rank 0 (pid" in err


def test_a_rank_that_ignores_the_request_is_killed(run_ranks: RunRanks, tmp_path: Path) -> None:
    start = time.monotonic()
    code, _, err = run_ranks(
        "endings", 2, case="stubborn", folder=str(tmp_path), options=RunOptions(grace_s=1.0)
    )
    assert code == 7, err
    assert time.monotonic() - start < 120  # it would go on for 600


def test_a_rank_that_the_kernel_does_not_let_go_is_named_and_left(
    run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("launcher.watch._KILL_S", 0.5)
    kill = os.killpg
    held: list[int] = []
    before = set(psutil.Process().children())

    def killpg(pid: int, number: int) -> None:
        if number == signal.SIGKILL:
            held.append(pid)
        else:
            kill(pid, number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", killpg)
        options = RunOptions(grace_s=1.0)
        code, _, err = run_ranks("endings", 2, case="stubborn", folder=str(tmp_path), options=options)
    for pid in set(held):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    _, left = psutil.wait_procs(set(psutil.Process().children()) - before, timeout=60)
    assert not left
    assert code == 7
    assert re.search(r"rank 1 \(pid \d+\) exited .* 7.*; rank 0 \(pid \d+\) cannot be killed", err), err


@pytest.mark.parametrize(
    ("cause", "code", "words"),
    [
        ("mistake", 2, "error: the value is wrong"),
        ("crash", 128 + 7, r"rank 0 .* was killed by SIGBUS"),
    ],
)
def test_the_cause_is_the_rank_that_failed_and_not_the_one_that_noticed(
    run_ranks: RunRanks, tmp_path: Path, cause: str, code: int, words: str
) -> None:
    found, _, err = run_ranks("endings", 2, case="noticed", folder=str(tmp_path), cause=cause)
    assert found == code, err
    assert re.search(words, err), err
    assert "gone" not in err


def test_what_a_rank_started_goes_with_it(run_ranks: RunRanks, tmp_path: Path) -> None:
    code, _, err = run_ranks("endings", 2, case="grandchild", folder=str(tmp_path))
    assert code == 0, err
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


def test_what_the_user_set_is_kept(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code, out, err = run_ranks("endings", 1, case="place")
    assert code == 0, err
    assert "OMP_NUM_THREADS=3" in out
    assert "OMP_NUM_THREADS=3 is kept" in err


def test_starts_in_a_row_leave_nothing_open(run_ranks: RunRanks) -> None:
    run_ranks("endings", 1, case="code")
    before, others = len(os.listdir("/proc/self/fd")), set(psutil.Process().children())
    for _ in range(5):
        run_ranks("endings", 2, case="code")
    assert len(os.listdir("/proc/self/fd")) == before
    assert set(psutil.Process().children()) <= others
