"""Start the ranks, forward what they print, and stop all of them when one fails.

One thread, one event loop over pipes, process descriptors and signals: nothing is polled. Every rank
leads a process group of its own, which is killed at the end whatever happened, so that compilers
started by a rank go with it.

What is not here: several nodes, heartbeats of ranks that hang without ending.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from launcher.errors import LaunchError
from launcher.plan import LaunchPlan, LaunchRequest

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAX_REPORT_BYTES = 1 << 20


@dataclass
class _Rank:
    """A started rank and what is known of it. The only mutable record of this module."""

    rank: int
    process: subprocess.Popen[bytes]
    report: bytes = b""
    line: bytes = field(default=b"")  # of its output, not yet ended

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"


def new_session() -> str:
    """A random token from which all names of one run derive, so that two runs never meet."""
    return secrets.token_hex(8)


def launch(
    plan: LaunchPlan,
    request: LaunchRequest,
    session: str,
    target: str,
    payload: str,
    checkout: Path,
) -> int:
    """Run `target`'s `main` in every rank of the plan and return the exit code of the whole.

    0 if all ranks returned 0; the code of the first rank that failed; 128 + n for a rank that signal
    n killed, or for a signal n to this process. One message on stderr says what happened. Raises
    LaunchError if a rank cannot be started.
    """
    with ExitStack() as stack:
        stack.callback(_remove_segments, session)
        wakeup = stack.enter_context(_signal_pipe())
        selector = stack.enter_context(selectors.DefaultSelector())
        ranks: list[_Rank] = []
        stack.callback(_kill_groups, ranks)
        _start(plan, request, session, target, payload, checkout, ranks, selector)
        selector.register(wakeup, selectors.EVENT_READ, None)
        return _watch(ranks, selector, wakeup, request.grace_s)


def _start(
    plan: LaunchPlan,
    request: LaunchRequest,
    session: str,
    target: str,
    payload: str,
    checkout: Path,
    ranks: list[_Rank],
    selector: selectors.BaseSelector,
) -> None:
    size = len(plan.ranks)
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    # -P keeps the current folder off the module path: a `comm` lying there is not ours.
    command = [sys.executable, "-P", "-m", "launcher.child", target, payload]
    # Bound here and handed to rank 0, so that no port is guessed and then taken by another.
    with socket.create_server(("127.0.0.1", 0), backlog=max(size, 16)) as store:
        shared = {
            "PYTHONPATH": path,
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "YOKE_SESSION": session,
            "YOKE_BACKEND": plan.backend,
            "YOKE_BIND": str(int(plan.bind_cores)),
            "YOKE_PLANS": json.dumps([asdict(rank) for rank in plan.ranks]),
            "YOKE_COMM_TIMEOUT": str(request.comm_timeout_s),
            "YOKE_PARENT_PID": str(os.getpid()),
        }
        for rank in range(size):
            read_end, write_end = os.pipe()
            handed = [write_end] + ([store.fileno()] if rank == 0 else [])
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "YOKE_REPORT_FD": str(write_end)}
            if rank == 0:
                own["YOKE_STORE_FD"] = str(store.fileno())
            try:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **shared, **own},
                    pass_fds=handed,
                    process_group=0,
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    stdout=None if rank == 0 else subprocess.PIPE,
                    stderr=None if rank == 0 else subprocess.STDOUT,
                )
            except OSError as error:
                os.close(read_end)
                if error.errno == errno.E2BIG:
                    raise LaunchError("the prompt is too long for a command line") from error
                raise LaunchError(f"rank {rank} cannot be started: {error}") from error
            finally:
                os.close(write_end)
            started = _Rank(rank, process)
            ranks.append(started)
            selector.register(
                os.fdopen(read_end, "rb", buffering=0), selectors.EVENT_READ, _reader(started)
            )
            if process.stdout is not None:
                selector.register(process.stdout, selectors.EVENT_READ, _forwarder(started))


def _watch(ranks: list[_Rank], selector: selectors.BaseSelector, wakeup: int, grace_s: float) -> int:
    """Until all ranks have ended: forward output, stop the rest at the first failure."""
    running = list(ranks)
    ended_well: list[_Rank] = []
    verdict: int | None = None
    message = ""
    deadline: float | None = None  # for the ranks that go on after one has ended
    killed = False
    while running:
        for number in _wait(selector, wakeup, deadline):
            if number in _STOP_SIGNALS:
                if verdict is None:
                    verdict = 128 + number
                    message = f"stopped by {signal.Signals(number).name}"
                    _signal_groups(running, signal.SIGTERM)
                    deadline = time.monotonic() + grace_s
                else:  # asked twice: at once
                    _signal_groups(running, signal.SIGKILL)
        ended = [rank for rank in running if rank.process.poll() is not None]
        # Of those that ended together, one that was killed is the cause; the others missed it.
        for rank in sorted(ended, key=lambda rank: rank.process.returncode >= 0):
            running.remove(rank)
            code = rank.process.returncode
            if code == 0:
                ended_well.append(rank)
                deadline = deadline or time.monotonic() + grace_s
            elif verdict is None:
                verdict, message = _failure(rank)
                _signal_groups(running, signal.SIGTERM)
                deadline = time.monotonic() + grace_s
        if running and deadline is not None and time.monotonic() >= deadline:
            if verdict is None:
                names = ", ".join(rank.name for rank in running)
                verdict = 1
                message = f"{ended_well[0].name} ended, but after {grace_s:g} s not: {names}"
                _signal_groups(running, signal.SIGTERM)
                deadline = time.monotonic() + grace_s
            elif not killed:
                _signal_groups(running, signal.SIGKILL)
                killed = True
                deadline = None
    _kill_groups(ranks)
    _drain(selector)
    if verdict is None:
        return 0
    # Read only now: a report may still have been in its pipe when its rank was reaped.
    print(_message(ranks, verdict, message), file=sys.stderr, flush=True)
    return verdict


def _wait(selector: selectors.BaseSelector, wakeup: int, deadline: float | None) -> Iterator[int]:
    """Handle what is ready, and yield the signals that arrived."""
    timeout = None if deadline is None else max(deadline - time.monotonic(), 0.0)
    for key, _ in selector.select(timeout):
        if key.data is None:
            yield from os.read(wakeup, 4096)
        else:
            _handle(selector, key)


def _handle(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> bool:
    """Read once from a rank's pipe; False at its end."""
    stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
    chunk = os.read(stream.fileno(), 65536)
    key.data(chunk)
    if not chunk:
        selector.unregister(stream)
        stream.close()
    return bool(chunk)


def _drain(selector: selectors.BaseSelector) -> None:
    """Read what the ended ranks left in their pipes, and no longer than that: a process that escaped
    its group could hold one open for ever."""
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
            key.fileobj.close()  # type: ignore[union-attr]


def _reader(rank: _Rank) -> Callable[[bytes], None]:
    def read(chunk: bytes) -> None:
        rank.report = (rank.report + chunk)[:_MAX_REPORT_BYTES]

    return read


def _forwarder(rank: _Rank) -> Callable[[bytes], None]:
    """Pass on whole lines with the rank's name; an unfinished one at the end of its output."""

    def forward(chunk: bytes) -> None:
        *lines, rank.line = (rank.line + chunk).split(b"\n")
        if not chunk and rank.line:
            lines.append(rank.line)
        for line in lines:
            sys.stderr.write(f"[rank {rank.rank}] {line.decode(errors='replace')}\n")
        sys.stderr.flush()

    return forward


def _failure(rank: _Rank) -> tuple[int, str]:
    """Exit code and message of a rank that ended badly; "" leaves the message to its report."""
    code = rank.process.returncode
    if code >= 0:
        return code, ""
    number = -code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return 128 + number, f"{rank.name} was killed by {name}; the other ranks were stopped"


def _message(ranks: list[_Rank], verdict: int, message: str) -> str:
    if message:
        return message
    failed = [rank for rank in ranks if rank.process.returncode == verdict]
    for rank in failed:
        if rank.report:
            try:
                report = json.loads(rank.report)
            except ValueError:
                continue
            if report["kind"] == "error":
                return f"error: {report['message']}"
            return f"{rank.name} failed:\n{report['traceback'].rstrip()}"
    names = ", ".join(rank.name for rank in failed)
    return f"{names} ended with exit code {verdict}; the other ranks were stopped"


def _signal_groups(ranks: list[_Rank], number: int) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.process.pid, number)


def _kill_groups(ranks: list[_Rank]) -> None:
    """Kill what is left of every rank's group, and reap the rank."""
    _signal_groups(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


@contextmanager
def _signal_pipe() -> Iterator[int]:
    """A descriptor that yields the number of each signal that arrives, as one byte."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # What was ignored when we were started stays so (nohup). SIGCHLD wakes the loop when a rank ends.
    stops = [n for n in _STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    numbers = (*stops, signal.SIGCHLD)
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


def _remove_segments(session: str) -> None:
    """Ranks unlink their segment as soon as all have mapped it; this is for one killed before."""
    for segment in Path("/dev/shm").glob(f"yoke-{session}*"):
        segment.unlink(missing_ok=True)
