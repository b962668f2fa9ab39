"""However a run is ended, it ends soon, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
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

SOON_S = 60.0  # on a machine that is busy; the text goes on for longer, and so do ranks


@pytest.fixture
def generating(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A run that is in the middle of its text; the parameter is a transport, and more flags."""
    flags = f"--comm={getattr(request, 'param', 'auto')}".split()
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch.py"), *flags, *WORDS],
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
    """The run ends with this code; its ranks are gone; the message. (What it leaves in /dev/shm is
    looked for after every test.)"""
    _, err = process.communicate(timeout=SOON_S)
    assert process.returncode == code, err
    _, alive = psutil.wait_procs(ranks, timeout=SOON_S)
    assert not alive
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


@pytest.mark.parametrize(
    ("generating", "waits"),
    [
        (
            "shm --comm-timeout=4 --grace=1",
            r"\w+ \(step \d+\): rank 0 waited 4 s for rank 1 \(pid {pid}\), .*",
        ),
        ("gloo --comm-timeout=4 --grace=1", "rank 0 stopped waiting for other ranks: Timed out.*"),
        ("shm --comm-timeout=4 --grace=1 --traceback", r"Traceback \(most.*(\n.*)+\nerror: .*"),
    ],
    indirect=["generating"],
)
def test_a_stopped_rank_is_named_in_one_message(generating: subprocess.Popen[str], waits: str) -> None:
    ranks = children(generating)
    target = next(rank for rank in ranks if rank_of(rank) == 1)
    target.suspend()
    err = expect_end(generating, ranks, 1)
    said = err[err.index("Traceback") :] if "Traceback" in waits else err.splitlines()[-1]
    before = "" if "Traceback" in waits else "error: "
    after = rf"; rank 1 \(pid {target.pid}\): it is stopped\s*"
    assert re.fullmatch(before + waits.replace("{pid}", str(target.pid)) + after, said), err
    assert ("Traceback" in err) == ("Traceback" in waits)


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
    _, alive = psutil.wait_procs(ranks, timeout=SOON_S)
    assert not alive


def test_a_reader_that_goes_away_ends_the_run_quietly() -> None:
    command = [sys.executable, str(CHECKOUT / "launch.py"), *WORDS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=SOON_S) == 141
    assert "Traceback" not in err
