"""Runs that are stopped, killed, stuck or silent, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.leftovers import own_processes
from tests.running import CHECKOUT, RunYoke

PROGRAM = """
import os, signal, subprocess, sys, time
rank, case = int(os.environ["RANK"]), sys.argv[1]
if case == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if case == "saves":
    signal.signal(signal.SIGUSR1, lambda *_: print(f"rank {rank} saves", flush=True))
child = subprocess.Popen(["sleep", "300"])
print("up", rank, os.getpid(), child.pid, flush=True)
if rank == 1 and case == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
if rank == 1 and case == "interpreter":
    import ctypes
    ctypes.PyDLL(None).sleep(300)
until = time.monotonic() + 300
while time.monotonic() < until:
    time.sleep(0.1)
"""


SOON_S = 120.0  # on a machine that is busy: less than the program takes, and than the longest grace


@dataclass(frozen=True)
class Run:
    """`ranks` are their pids, `pids` those and their children's."""

    process: subprocess.Popen[str]
    ranks: list[int]
    pids: list[int]


@contextmanager
def running(tmp_path: Path, case: str, *flags: str, ranks: int = 2) -> Iterator[Run]:
    """A run of PROGRAM whose ranks are all up."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    words = ["run", "--ranks", str(ranks), *flags, str(script), case]
    with subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch.py"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(ranks)]
        places = {int(words[-3]): (int(words[-2]), int(words[-1])) for words in lines}
        own = [places[rank][0] for rank in range(ranks)]
        try:
            yield Run(process, own, [pid for pair in places.values() for pid in pair])
        finally:
            process.kill()


def expect_end(run: Run, code: int, words: str) -> str:
    """It ends long before its program does, or its grace."""
    _, err = run.process.communicate(timeout=SOON_S)
    assert run.process.returncode == code, err
    assert words in err
    expect_gone(run.pids)
    return err


def expect_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SOON_S
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in alive]
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "plain", "--grace", "200") as run:
        run.process.send_signal(number)
        expect_end(run, 128 + number, f"stopped by {number.name}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_deaf_ranks_are_killed_after_the_grace(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "deaf", "--grace", "1") as run:
        run.process.send_signal(number)
        expect_end(run, 128 + number, f"stopped by {number.name}")


def test_asked_twice_is_at_once(tmp_path: Path) -> None:
    with running(tmp_path, "deaf", "--grace", "200") as run:
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        run.process.send_signal(signal.SIGINT)
        expect_end(run, 130, "stopped by SIGINT")


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path, "deaf") as run:
        run.process.kill()
        run.process.wait(SOON_S)
        expect_gone(run.pids)  # the ranks, and what they had started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(tmp_path: Path, victim: int, number: signal.Signals) -> None:
    with running(tmp_path, "plain", "--grace", "200") as run:
        os.kill(run.ranks[victim], number)
        name = f"rank {victim} (pid {run.ranks[victim]}) was killed by {number.name}"
        expect_end(run, 128 + number, name)


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    with running(tmp_path, "stopped", "--hang-timeout", "3", "--grace", "1") as run:
        err = expect_end(run, 1, f"rank 1 (pid {run.ranks[1]}) sent no heartbeat")
        assert "it is stopped" in err
        assert f"rank 0 (pid {run.ranks[0]})" not in err


def test_a_rank_whose_interpreter_is_stuck_shows_where(tmp_path: Path) -> None:
    with running(tmp_path, "interpreter", "--hang-timeout", "3", "--grace", "1") as run:
        err = expect_end(run, 1, f"rank 1 (pid {run.ranks[1]}) sent no heartbeat")
        assert 'program.py", line' in err


def test_a_busy_rank_is_not_taken_for_stuck(run_yoke: RunYoke, tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(
        "import time\nuntil = time.monotonic() + 5\nwhile time.monotonic() < until: pass\n"
    )
    result = run_yoke("run", "--ranks", "2", "--hang-timeout", "3", str(script))
    assert result.returncode == 0, result.stderr


def test_a_rank_that_does_not_start_is_named(tmp_path: Path, run_yoke: RunYoke) -> None:
    # Python runs sitecustomize before anything of ours.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1': time.sleep(300)\n"
    )
    script = tmp_path / "script.py"
    script.write_text("import time\ntime.sleep(300)\n")
    result = run_yoke(
        "run", "--ranks", "2", "--start-timeout", "8", "--grace", "1", str(script),
        PYTHONPATH=str(tmp_path), timeout=SOON_S,
    )  # fmt: skip
    assert result.returncode == 1
    assert "rank 1 (pid" in result.stderr
    assert "had not started its program after 8 s (--start-timeout)" in result.stderr
    assert "rank 0 (pid" not in result.stderr


def test_signals_that_programs_use_are_passed_on(tmp_path: Path) -> None:
    with running(tmp_path, "saves", "--grace", "200") as run:
        time.sleep(0.2)
        run.process.send_signal(signal.SIGUSR1)
        process = run.process
        assert process.stdout is not None and process.stderr is not None
        lines = {process.stdout.readline().split("] ")[-1].strip() for _ in range(2)}
        assert lines == {"rank 0 saves", "rank 1 saves"}
        run.process.send_signal(signal.SIGQUIT)  # every rank shows its stacks, and goes on
        while "program.py" not in process.stderr.readline():
            pass
        assert process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        expect_end(run, 143, "stopped by SIGTERM")


def test_logs_hold_each_ranks_output_and_rank_0_stays_untouched(
    tmp_path: Path, run_yoke: RunYoke
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nr = os.environ['RANK']\nprint('out', r)\nprint('err', r, file=sys.stderr)\n"
        "print('no end', end='')\n"
    )
    folder = tmp_path / "new" / "logs"
    result = run_yoke("run", "--ranks", "2", "--log-dir", str(folder), str(script))
    assert result.returncode == 0, result.stderr
    assert {"out 0", "no end"} <= set(result.stdout.splitlines())
    assert "[rank 0]" not in result.stdout + result.stderr
    assert "[rank 1] out 1\n" in result.stdout and "[rank 1] no end\n" in result.stdout
    assert "err 0\n" in result.stderr
    assert "[rank 1] err 1\n" in result.stderr
    for rank in (0, 1):
        text = (folder / f"rank-{rank}.log").read_text()
        assert f"out {rank}\n" in text and f"err {rank}\n" in text and "no end" in text
    (tmp_path / "file").write_text("")
    result = run_yoke("run", "--log-dir", str(tmp_path / "file" / "x"), str(script))
    assert result.returncode == 2
    assert "--log-dir" in result.stderr


def test_rank_0_keeps_a_terminal_with_logs(tmp_path: Path) -> None:
    import pty

    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('terminal', sys.stdout.isatty())\n")
    words = ["run", "--log-dir", str(tmp_path / "logs"), str(script)]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "launch.py"), *words],
        stdin=slave, stdout=slave, stderr=slave, close_fds=True,
    )  # fmt: skip
    os.close(slave)
    assert process.wait(SOON_S) == 0
    assert b"terminal True" in os.read(master, 4096)
    os.close(master)
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "terminal True\n"


def test_fifty_starts_leave_nothing_behind(tmp_path: Path, run_yoke: RunYoke) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nsys.exit(3 if os.environ['RANK'] == sys.argv[1] else 0)\n")
    before = {process.pid for process in own_processes()}
    for i in range(50):
        result = run_yoke("run", "--ranks", "2", str(script), str(i % 3))
        assert result.returncode == (3 if i % 3 < 2 else 0), result.stderr
    expect_gone([process.pid for process in own_processes() if process.pid not in before])
