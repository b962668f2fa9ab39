"""However a run is ended, it ends soon, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent.parent
WORDS = (
    "--bind-cores-to-rank",
    "--ranks=2",
    "model=tiny",
    "weights=random",
    "num_layers=8",
    "prompt=abc",
    "max_new_tokens=2000",
    "max_seq_len=2010",
    "compile=false",
)


@pytest.fixture
def generating(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """A run that is in the middle of its text; the parameter is a transport."""
    comm = f"--comm={getattr(request, 'param', 'auto')}"
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch.py"), comm, *WORDS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job, as tests may be, has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.read(20), process.stderr.read() if process.stderr else ""
    yield process
    process.kill()
    process.communicate()


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def rank_of(child: psutil.Process) -> int | None:
    rank = child.environ().get("RANK")
    return None if rank is None else int(rank)


def expect_end(process: subprocess.Popen[str], ranks: list[psutil.Process], code: int) -> str:
    """The run ends within 10 s with this code; its ranks are gone; the message."""
    _, err = process.communicate(timeout=10)
    assert process.returncode == code, err
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    assert not list(Path("/dev/shm").glob("yoke-*"))
    return err


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("generating", ["shm", "gloo"], indirect=True)
def test_a_killed_rank_ends_the_run_and_is_named(
    generating: subprocess.Popen[str], victim: int
) -> None:
    ranks = children(generating)
    assert len(ranks) == 2
    target = next(rank for rank in ranks if rank_of(rank) == victim)
    target.send_signal(signal.SIGKILL)
    err = expect_end(generating, ranks, 128 + signal.SIGKILL)
    assert f"rank {victim} (pid {target.pid}) was killed by SIGKILL" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_stops_the_ranks(
    generating: subprocess.Popen[str], number: signal.Signals
) -> None:
    ranks = children(generating)
    if number == signal.SIGINT:
        os.killpg(generating.pid, number)  # what a terminal does on Ctrl-C
    else:
        generating.send_signal(number)
    assert number.name in expect_end(generating, ranks, 128 + number)


def test_the_death_of_the_command_takes_the_ranks_along(
    generating: subprocess.Popen[str],
) -> None:
    ranks = children(generating)
    generating.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_a_reader_that_goes_away_ends_the_run_quietly() -> None:
    command = [sys.executable, str(CHECKOUT / "launch.py"), *WORDS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(20)
    process.stdout.close()
    start = time.monotonic()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=30) == 141
    assert time.monotonic() - start < 20
    assert "Traceback" not in err
