"""Watch started ranks until all have ended: one thread, one loop over pipes and signals.

The first failure decides the exit code. The other ranks are then asked to stop (SIGTERM), and killed
after `grace_s`. Nothing is polled: the loop wakes up for SIGCHLD when a rank ends, for a rank's pipe
when it reports, and at deadlines.
"""

from __future__ import annotations

import errno
import json
import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from base.streams import say
from launcher.chat.console import Console, end_console

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Only passed on to the ranks: programs save checkpoints on USR1/2, ranks print their stacks on QUIT.
_PASSED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
_KILL_S = (
    10.0  # from killing a rank to giving it up: a rank that waits for a device or disk cannot be killed
)
_MAX_REPORT_BYTES = 1 << 20
_STATES = {"T": "it is stopped", "t": "it is being traced", "D": "it waits in the kernel"}  # proc(5)


@dataclass
class Rank:
    """A started rank and its state. The only mutable record of the launcher."""

    rank: int
    process: subprocess.Popen[bytes]
    report: bytes = b""
    code: int | None = None  # once it has ended: as subprocess's returncode, -n for signal n
    started: bool = False  # whether the target's code is running
    spawned_at: float = field(default_factory=time.monotonic)
    seen_at: float = field(default_factory=time.monotonic)  # time of the last heartbeat or report

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"

    def has_ended(self) -> bool:
        """Whether the rank has ended; `code` is then set. The rank stays a zombie until `kill_groups`
        reaps it, so no other process can get its pid or group id while we may still signal them."""
        if self.code is None:
            end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                self.code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return self.code is not None

    def read_report(self, chunk: bytes) -> None:
        """Take a chunk from the rank's report pipe: lines of JSON; an empty line is a heartbeat."""
        self.seen_at = time.monotonic()
        self.report = (self.report + chunk).lstrip(b"\n")[:_MAX_REPORT_BYTES]
        if self.report.startswith(b'{"kind": "started"}\n'):
            self.started = True
            self.report = self.report[len(b'{"kind": "started"}\n') :].lstrip(b"\n")


@dataclass(frozen=True)
class _Verdict:
    """The exit code of the run and its message (empty: take it from the failed rank's report). `held`
    names the ranks that were stopped or blocked in the kernel at that time."""

    code: int
    message: str = ""
    held: str = ""


def watch(
    ranks: Sequence[Rank],
    selector: selectors.BaseSelector,
    wakeup: int,
    console: Console | None = None,
    *,
    grace_s: float,
    start_timeout_s: float,
    hang_timeout_s: float,
    tracebacks: bool = False,
) -> int:
    """Wait until all ranks have ended, print one message on stderr if the run failed, and return the
    exit code of the run.

    Rank pipes are registered in `selector` with a function that takes each chunk, `wakeup` (from
    `signal_pipe`) with None. Times are in seconds; `start_timeout_s` and `hang_timeout_s` are off at 0.
    The end of the console ends the run. `tracebacks`: show them for errors that have a message too.
    """
    running = list(ranks)
    ended_well: list[str] = []
    verdict: _Verdict | None = None
    # Deadline of the next step: ask the running ranks to stop, then kill them, then give them up.
    stop_at: float | None = None
    killed = False

    def decide(code: int, message: str = "", ask: int | None = signal.SIGTERM) -> None:
        nonlocal verdict, stop_at
        held = (
            ""
            if message
            else "".join(f"; {rank.name}: {_state(rank)}" for rank in running if _state(rank))
        )
        verdict = _Verdict(code, message, held)
        stop_at = time.monotonic() + grace_s
        if ask is not None:
            signal_groups(running, ask)
        if console is not None and console.process.poll() is None:
            console.process.terminate()

    def due_at(rank: Rank) -> float:
        """The time at which this rank counts as stuck."""
        hang = rank.seen_at + (hang_timeout_s or math.inf)
        return hang if rank.started else min(hang, rank.spawned_at + (start_timeout_s or math.inf))

    while running:
        deadlines = [] if stop_at is None else [stop_at]
        if verdict is None:
            deadlines += [due_at(rank) for rank in running]
        for number in _wait(selector, wakeup, min(deadlines, default=math.inf)):
            if number in _PASSED_SIGNALS:
                _signal_ranks(running, number)
            elif number == signal.SIGINT and console is not None and console.answers_interrupts:
                pass
            elif number in _STOP_SIGNALS and verdict is None:
                decide(128 + number, f"stopped by {signal.Signals(number).name}", number)
            elif number in _STOP_SIGNALS:  # a second signal: kill at once
                signal_groups(running, signal.SIGKILL)
        if console is not None and verdict is None and not ended_well:
            code = console.process.poll()
            if code:
                decide(*console.failure())
            elif code == 0:  # rank 0 sees its channel close, and ends the run
                ended_well.append("the chat")
                stop_at = time.monotonic() + grace_s
        ended = [rank for rank in running if rank.has_ended()]
        # If several ended together, one killed by a signal is the cause: the others failed without it.
        for rank in sorted(ended, key=lambda rank: (rank.code or 0) >= 0):
            running.remove(rank)
            if rank.code == 0:
                ended_well.append(rank.name)
                stop_at = stop_at or time.monotonic() + grace_s
            elif verdict is None:
                decide(*_failure(rank))
        now = time.monotonic()
        if verdict is None and (stuck := [rank for rank in running if now >= due_at(rank)]):
            _signal_ranks(stuck, signal.SIGQUIT)  # they print their stacks
            message = _stuck(stuck, start_timeout_s, hang_timeout_s)
            signal_groups([rank for rank in running if rank not in stuck], signal.SIGTERM)
            decide(1, message, ask=None)
        elif running and stop_at is not None and now >= stop_at:
            if verdict is None:
                names = ", ".join(rank.name for rank in running)
                decide(
                    1,
                    f"{ended_well[0]} exited with code 0, and {grace_s:g} s later these were still "
                    f"running: {names}; all ranks were stopped",
                )
            elif not killed:
                signal_groups(running, signal.SIGKILL)
                killed, stop_at = True, now + _KILL_S
            else:
                break  # the kernel does not end them
    kill_groups(ranks)
    if console is not None:
        end_console(console)
    _drain(selector)
    if verdict is None:
        return 0
    # Reports are read only now: one may still have been in its pipe when its rank was reaped.
    verdict = _find_cause(ranks, verdict)
    left = "".join(
        f"; {rank.name} cannot be killed: {_state(rank) or 'it still runs'}" for rank in running
    )
    message = verdict.message or _reported(ranks, verdict.code, tracebacks) + verdict.held
    say(message + left)
    return verdict.code


def _wait(selector: selectors.BaseSelector, wakeup: int, deadline: float) -> Iterator[int]:
    """Wait until `deadline`, read the pipes that are ready, and yield the signals that arrived."""
    timeout = None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)
    for key, _ in selector.select(timeout):
        if key.data is None:
            yield from os.read(wakeup, 4096)
        else:
            _handle(selector, key)


def _handle(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Read once from a rank's pipe; close the pipe at its end."""
    stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
    try:
        chunk = os.read(stream.fileno(), 65536)
    except OSError as error:
        if error.errno != errno.EIO:  # EIO is the end of a pseudo-terminal
            raise
        chunk = b""
    key.data(chunk)
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
            key.data(b"")
            key.fileobj.close()  # type: ignore[union-attr]


def _failure(rank: Rank) -> tuple[int, str]:
    """Exit code and message of a rank that failed; "" if its report has the message."""
    code = rank.code
    assert code is not None
    if code >= 0:
        return code, ""
    number = -code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return 128 + number, f"{rank.name} was killed by {name}; the other ranks were stopped"


def _stuck(stuck: Sequence[Rank], start_timeout_s: float, hang_timeout_s: float) -> str:
    """The message about stuck ranks: which limit each exceeded, and its state in the kernel."""
    parts = []
    for rank in stuck:
        silent_s = time.monotonic() - rank.seen_at
        what = (
            f"sent no heartbeat for {silent_s:.0f} s (--hang-timeout {hang_timeout_s:g})"
            if hang_timeout_s and silent_s >= hang_timeout_s
            else f"had not started its program after {start_timeout_s:g} s (--start-timeout)"
        )
        what += f"; {_state(rank)}" if _state(rank) else ""
        parts.append(f"{rank.name} {what}")
    return "; ".join(parts) + "; all ranks were stopped"


def _state(rank: Rank) -> str:
    """What keeps a rank from running (stopped, traced, in the kernel); "" if nothing does."""
    with suppress(OSError, IndexError):
        stat = Path(f"/proc/{rank.process.pid}/stat").read_text(errors="replace")
        return _STATES.get(stat.rpartition(")")[2].split()[0], "")
    return ""


def _find_cause(ranks: Sequence[Rank], verdict: _Verdict) -> _Verdict:
    """The verdict on the rank that failed by itself, if the given one is on a rank that only noticed
    that its peer had gone: the closed connection of a rank can be noticed before its end."""
    first = next((rank for rank in ranks if rank.code == verdict.code), None)
    if verdict.message or first is None or _error_of(first).get("kind") != "peer":
        return verdict
    for rank in ranks:
        if (rank.code or 0) < 0 and rank.code not in (-signal.SIGTERM, -signal.SIGKILL):
            return _Verdict(*_failure(rank), verdict.held)
    for rank in ranks:
        if rank.code and rank.code > 0 and _error_of(rank).get("kind") != "peer":
            return _Verdict(rank.code, "", verdict.held)
    return verdict


def _error_of(rank: Rank) -> dict[str, str]:
    """The error that the rank reported, empty if it reported none."""
    for line in rank.report.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            report: dict[str, str] = json.loads(line)
            if report["kind"]:
                return report
    return {}


def _reported(ranks: Sequence[Rank], code: int, tracebacks: bool) -> str:
    """The message from the failed ranks' reports: a user error once, else the first one's traceback."""
    failed = [rank for rank in ranks if rank.code == code]
    for rank in failed:
        error = _error_of(rank)
        if error.get("kind") in ("error", "peer"):
            return f"{error.get('traceback', '') if tracebacks else ''}error: {error['message']}"
        if error:
            return f"{rank.name} failed:\n{error['traceback'].rstrip()}"
    names = ", ".join(rank.name for rank in failed)
    return f"{names} exited with code {code}; the other ranks were stopped"


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
