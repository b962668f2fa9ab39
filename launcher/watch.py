"""Watch started ranks until all have ended: one thread, one loop over pipes and signals.

A run goes through phases: running, ending, asked to stop, killed, given up. The first failure decides
the exit code. The other ranks are then asked to stop (SIGTERM), and killed after `grace_s`. Nothing is
polled: the loop wakes up for SIGCHLD when a rank ends, for a rank's pipe when it reports, and at
deadlines.

What is not here: `launcher.rank` is a rank's process and reports, `launcher.verdict` what is said about
a run that failed.
"""

from __future__ import annotations

import errno
import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import IO

from base.streams import say
from launcher.chat.console import Console, end_console
from launcher.output import Outlet, UnreadError, settle
from launcher.rank import Rank
from launcher.verdict import Verdict, find_cause, message_of, on_failed, on_left, on_stuck

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Only passed on to the ranks: programs save checkpoints on USR1/2, ranks print their stacks on QUIT.
_PASSED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
# From killing a rank to giving it up: a rank that waits for a device or disk cannot be killed.
_KILL_S = 10.0


@dataclass(frozen=True)
class TimeLimits:
    """Limits in seconds; `start_s` and `hang_s` are off at 0. `grace_s`: from asking ranks to stop to
    killing them. `start_s`: from the start to the target's first line. `hang_s`: how long a rank may
    send no heartbeat."""

    grace_s: float
    start_s: float
    hang_s: float

    def due_at(self, rank: Rank) -> float:
        """The time at which this rank counts as stuck."""
        hang = rank.seen_at + (self.hang_s or math.inf)
        return hang if rank.started else min(hang, rank.spawned_at + (self.start_s or math.inf))


@dataclass(frozen=True)
class Run:
    """What is watched: ranks, and the console if there is one."""

    ranks: Sequence[Rank]
    limits: TimeLimits
    console: Console | None = None
    outlets: Sequence[Outlet] = ()  # where lines of ranks may wait

    def running(self) -> list[Rank]:
        """The ranks whose end has not been noticed yet."""
        return [rank for rank in self.ranks if rank.code is None]


class Phase(Enum):
    RUNNING = auto()
    ENDING = auto()  # a rank or the console has ended well: the others have `grace_s` to end too
    ASKED = auto()  # the run has failed, and the ranks that were left have been asked to stop
    KILLED = auto()
    GIVEN_UP = auto()  # the kernel does not end the ranks that are left


@dataclass(frozen=True)
class Stage:
    """The phase of a run and the time at which the next one begins. `first`: what ended well first, in
    ENDING; `verdict`: why the run failed, from ASKED on."""

    phase: Phase = Phase.RUNNING
    deadline: float = math.inf
    first: str = ""
    verdict: Verdict | None = None


def watch(run: Run, selector: selectors.BaseSelector, wakeup: int, tracebacks: bool = False) -> int:
    """Wait until all ranks have ended, print one message on stderr if the run failed, and return the
    exit code of the run.

    Rank pipes are registered in `selector` with a function that takes each chunk, `wakeup` (from
    `signal_pipe`) with None. The end of the console ends the run. `tracebacks`: show them for errors
    that have a message too.
    """
    stage = Stage()
    while run.running() and stage.phase is not Phase.GIVEN_UP:
        for number in _wait(selector, wakeup, _wake_at(run, stage)):
            stage = after_signal(run, stage, number)
        stage = after_console(run, stage)
        stage = after_ends(run, stage)
        stage = after_time(run, stage, time.monotonic())
        for outlet in run.outlets:
            settle(outlet, time.monotonic())
    kill_groups(run.ranks)
    if run.console is not None:
        end_console(run.console)
    _drain(selector)
    for outlet in run.outlets:
        settle(outlet, math.inf)
    if stage.verdict is None:
        return 0
    # Reports are read only now: one may still have been in its pipe when its rank was reaped.
    verdict = find_cause(run.ranks, stage.verdict)
    say(message_of(verdict, run.ranks, tracebacks))
    return verdict.code


def _wake_at(run: Run, stage: Stage) -> float:
    """The time at which something must be done even if nothing happens."""
    stuck = map(run.limits.due_at, run.running()) if stage.verdict is None else ()
    return min(stage.deadline, *stuck, *(outlet.due for outlet in run.outlets), math.inf)


def after_signal(run: Run, stage: Stage, number: int) -> Stage:
    """The stage after this process got a signal."""
    if number in _PASSED_SIGNALS:
        _signal_ranks(run.running(), number)
    elif number == signal.SIGINT and run.console is not None and run.console.answers_interrupts:
        pass
    elif number in _STOP_SIGNALS:
        if stage.verdict is not None:  # a second signal: kill at once
            return _kill(run, stage)
        return _ask_to_stop(
            run, Verdict(128 + number, f"stopped by {signal.Signals(number).name}"), number
        )
    return stage


def after_console(run: Run, stage: Stage) -> Stage:
    """The stage after checking whether the console has ended."""
    if run.console is None or stage.phase is not Phase.RUNNING:
        return stage
    code = run.console.process.poll()
    if code:
        return _ask_to_stop(run, Verdict(*run.console.failure()))
    # Rank 0 sees its channel close, and ends the run.
    return stage if code is None else _end(run, "the chat")


def after_ends(run: Run, stage: Stage) -> Stage:
    """The stage after checking which ranks have ended."""
    ended = [rank for rank in run.running() if rank.has_ended()]
    # If several ended together, one killed by a signal is the cause: the others failed without it.
    for rank in sorted(ended, key=lambda rank: (rank.code or 0) >= 0):
        if rank.code != 0 and stage.verdict is None:
            stage = _ask_to_stop(run, on_failed(rank, run.running()))
        elif rank.code == 0 and stage.phase is Phase.RUNNING:
            stage = _end(run, rank.name)
    return stage


def after_time(run: Run, stage: Stage, now: float) -> Stage:
    """The stage at the time `now`: whether ranks are stuck, and whether the next phase begins."""
    running, limits = run.running(), run.limits
    if stage.verdict is None and (stuck := [rank for rank in running if now >= limits.due_at(rank)]):
        _signal_ranks(stuck, signal.SIGQUIT)  # they print their stacks, so they are not asked to stop
        others = [rank for rank in running if rank not in stuck]
        return _ask_to_stop(run, on_stuck(stuck, limits.start_s, limits.hang_s), ranks=others)
    if not running or now < stage.deadline:
        return stage
    if stage.phase is Phase.ENDING:
        return _ask_to_stop(run, on_left(stage.first, running, limits.grace_s))
    if stage.phase is Phase.ASKED:
        return _kill(run, stage)
    return replace(stage, phase=Phase.GIVEN_UP)


def _end(run: Run, first: str) -> Stage:
    """Give the others the grace period to end, since `first` has ended well."""
    return Stage(Phase.ENDING, time.monotonic() + run.limits.grace_s, first)


def _ask_to_stop(
    run: Run,
    verdict: Verdict,
    number: int = signal.SIGTERM,
    ranks: Sequence[Rank] | None = None,
) -> Stage:
    """Ask the running ranks (or only `ranks`) and the console to stop, since the run has failed."""
    signal_groups(run.running() if ranks is None else ranks, number)
    if run.console is not None and run.console.process.poll() is None:
        run.console.process.terminate()
    return Stage(Phase.ASKED, time.monotonic() + run.limits.grace_s, verdict=verdict)


def _kill(run: Run, stage: Stage) -> Stage:
    """Kill the groups of the ranks that have not ended."""
    signal_groups(run.running(), signal.SIGKILL)
    if stage.phase is Phase.KILLED:
        return stage
    return replace(stage, phase=Phase.KILLED, deadline=time.monotonic() + _KILL_S)


def _wait(selector: selectors.BaseSelector, wakeup: int, deadline: float) -> Iterator[int]:
    """Wait until `deadline`, read the pipes that are ready, and yield the signals that arrived."""
    timeout = None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)
    for key, _ in selector.select(timeout):
        if key.data is None:
            yield from os.read(wakeup, 4096)
        else:
            _handle(selector, key)


def _handle(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Read once from a rank's pipe; close the pipe at its end, or if nobody reads what it passes on."""
    stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
    try:
        chunk = os.read(stream.fileno(), 65536)
    except OSError as error:
        if error.errno != errno.EIO:  # EIO is the end of a pseudo-terminal
            raise
        chunk = b""
    try:
        key.data(chunk)
    except UnreadError:
        chunk = b""
    if not chunk:
        selector.unregister(stream)
        stream.close()


def _drain(selector: selectors.BaseSelector) -> None:
    """Read what the ended ranks left in their pipes, but do not wait for the pipes to close: a process
    that left its group could hold one open forever."""
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        ready = [key for key, _ in selector.select(0) if key.data is not None]
        if not ready:
            break
        for key in ready:
            _handle(selector, key)
    for key in list(selector.get_map().values()):
        if key.data is not None:
            selector.unregister(key.fileobj)
            with suppress(UnreadError):
                key.data(b"")
            key.fileobj.close()  # type: ignore[union-attr]


def _signal_ranks(ranks: Sequence[Rank], number: int) -> None:
    """Send a signal to the ranks' own processes, if they have started (and installed handlers)."""
    for rank in ranks:
        if rank.started:
            with suppress(ProcessLookupError):
                os.kill(rank.process.pid, number)


def signal_groups(ranks: Sequence[Rank], number: int) -> None:
    """Send a signal to the process groups of the ranks. None of the ranks may have been reaped."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.process.pid, number)


def kill_groups(ranks: Sequence[Rank]) -> None:
    """Kill what is left of every rank's group, and reap the ranks that the kernel lets end."""
    ranks = [rank for rank in ranks if rank.process.returncode is None]  # those not reaped yet
    signal_groups(ranks, signal.SIGKILL)
    until = time.monotonic() + _KILL_S
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(until - time.monotonic(), 0.0))


@contextmanager
def signal_pipe() -> Iterator[int]:
    """A descriptor that yields the number of each signal that arrives, as one byte."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # Signals ignored at our start stay ignored (nohup). SIGCHLD wakes the loop when a rank ends.
    wanted = [n for n in (*_STOP_SIGNALS, *_PASSED_SIGNALS) if signal.getsignal(n) != signal.SIG_IGN]
    numbers = (*wanted, signal.SIGCHLD)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield read_end
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(read_end)
        os.close(write_end)
