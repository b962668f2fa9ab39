"""Running the command, and running ranks: what the fixtures `run_yoke` and `run_ranks` are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# `run_yoke(*words, timeout=600, **environ)`
RunYoke = Callable[..., "subprocess.CompletedProcess[str]"]
# `run_ranks(name, size, comm, **payload)`: exit code, stdout, stderr
RunRanks = Callable[..., tuple[int, str, str]]


def yoke(*words: str, timeout: float = 600, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `python launch.py words...` to its end."""
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "launch.py"), *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
    )


def run_case(module: str, case: str, before: tuple[str, ...] = ()) -> str:
    """Run a case of tests/targets/MODULE in a process of its own, which forks ranks; what it printed.
    `before` are words that run a command differently, such as those of `unshare`."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "tests.child", module, case],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=CHECKOUT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def refused(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *words: object
) -> str:
    """Run a command that must end with exit code 2; the one line that it says."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 and said.out == "", said
    return lines[0]


def wait_for_files(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Until a process that runs has written one: it can be interrupted in the middle of its work."""
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, f"it ended with {process.returncode} before it wrote {pattern}"
        assert time.monotonic() < deadline, f"it did not write {pattern}"
        time.sleep(0.005)
