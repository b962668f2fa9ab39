"""Start one process per rank of a plan, and pass them to `launcher.watch`.

Every rank leads its own process group. The group is always killed at the end, so that compilers which
a rank started end with it. A rank receives its settings in an anonymous file, not on its command
line: prompts may be long, and other users can read command lines.

What is not here: several machines (`launcher.elastic`), ranks that others start (`launcher.manager`).
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from base.errors import LaunchError
from launcher.allocator import allocator_variables
from launcher.chat.console import start_console
from launcher.child import CHECKOUT, PROGRAM, RankEnv, env_to_json
from launcher.guard import MARK, mark_of, remove_segments
from launcher.output import Outlet, Sink, open_channel, open_log, open_outlets, pieces, whole_lines
from launcher.plan import LaunchPlan
from launcher.rank import Rank
from launcher.watch import Run, TimeLimits, kill_groups, signal_pipe, watch


@dataclass(frozen=True)
class RunOptions:
    """How ranks are watched. Times are in seconds; 0 means no limit for the start and hang timeouts.

    `grace_s`: from asking ranks to stop to killing them. `comm_timeout_s`: how long one rank waits
    for another. `start_timeout_s`: from the start to the target's first line. `hang_timeout_s`: how
    long a rank may send no heartbeat. `secret_file`: the secret that ranks on several machines share.
    `tracebacks`: show them for user errors too.
    """

    grace_s: float = 5.0
    comm_timeout_s: float = 60.0
    start_timeout_s: float = 300.0
    hang_timeout_s: float = 120.0
    log_dir: Path | None = None
    secret_file: Path | None = None
    verify_placement: bool = False
    tracebacks: bool = False


def new_session() -> str:
    """A random token. All names of a run derive from it, so two runs never share a name."""
    return secrets.token_hex(8)


def launch(
    plan: LaunchPlan,
    options: RunOptions,
    session: str,
    target: str,
    payload: str,
    console: Sequence[str] | None = None,
) -> int:
    """Run `target`'s `main` in every rank of the plan and return the exit code of the run.

    It is 0 if all ranks returned 0, else the code of the first rank that failed; 128 + n if signal n
    killed a rank or reached this process. One message on stderr says what happened. Raises
    LaunchError if a rank cannot be started. `console` is the command of a process that has the terminal
    and a channel to rank 0 (`launcher.chat.console`); when that process ends, the run ends.
    """
    with ExitStack() as stack:
        stack.callback(remove_segments, session)
        wakeup = stack.enter_context(signal_pipe())
        selector = stack.enter_context(selectors.DefaultSelector())
        guard, pipe = _start_guard(session, stack)
        started, channel = None, None
        if console is not None:
            started, channel = start_console(console, stack)
        ranks: list[Rank] = []
        stack.callback(kill_groups, ranks)
        outlets = open_outlets()
        start = _Start(plan, options, session, target, payload, selector, stack, outlets)
        # Bound here and passed to rank 0, so no other process can take the port in between.
        with socket.create_server(("127.0.0.1", 0), backlog=max(len(plan.ranks), 16)) as store:
            for env in _environments(start, store, channel):
                ranks.append(_start_rank(start, env))
                pipe.write(b"%d\n" % ranks[-1].process.pid)
        if channel is not None:
            channel.close()  # only rank 0 keeps this end, so the console notices when rank 0 ends
        guard.wait()  # reaps the guard's first process, which ends once the guard has detached itself
        selector.register(wakeup, selectors.EVENT_READ, None)
        limits = TimeLimits(options.grace_s, options.start_timeout_s, options.hang_timeout_s)
        return watch(Run(ranks, limits, started, outlets), selector, wakeup, options.tracebacks)


def _start_guard(session: str, stack: ExitStack) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start the process that cleans up if the launcher is killed; return it and the pipe it reads."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", str(CHECKOUT / "launcher" / "guard.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    pipe, end = guard.stdin, guard.stdout
    assert pipe is not None and end is not None

    def dismiss() -> None:
        guard.wait()
        with suppress(BrokenPipeError):
            pipe.write(b"done\n")
        pipe.close()
        end.read()  # until it has ended
        end.close()

    stack.callback(dismiss)
    pipe.write(f"{session}\n".encode())
    return guard, pipe


@dataclass(frozen=True)
class _Start:
    """What all ranks of a run are started with. Their pipes are registered in `selector`; `stack` is
    closed when the run has ended; `outlets` are those of stdout and stderr."""

    plan: LaunchPlan
    options: RunOptions
    session: str
    target: str
    payload: str
    selector: selectors.BaseSelector
    stack: ExitStack
    outlets: tuple[Outlet, Outlet]

    @property
    def merges(self) -> bool:
        """Whether lines of rank 0 are merged with those of others: programs of the user's may print a
        line in pieces. Our own print text as it comes, and nothing on other ranks but messages."""
        return self.target == PROGRAM and len(self.plan.ranks) > 1


def _environments(
    start: _Start, store: socket.socket, channel: socket.socket | None
) -> Iterator[RankEnv]:
    """The settings of each rank. Rank 0 gets the listening socket of the store, and its end of the
    channel to the console if there is one."""
    plan, options = start.plan, start.options
    size = len(plan.ranks)
    for place in plan.ranks:
        first = place.rank == 0
        yield RankEnv(
            rank=place.rank,
            world_size=size,
            local_rank=place.rank,
            local_world_size=size,
            session=start.session,
            backend=plan.backend,
            master_addr="127.0.0.1",
            master_port=store.getsockname()[1],
            comm_timeout_s=options.comm_timeout_s,
            start_timeout_s=options.start_timeout_s,
            plan=place,
            plans=[asdict(rank) for rank in plan.ranks],
            bind_cores=plan.bind_cores,
            store_fd=store.fileno() if first else None,
            channel_fd=channel.fileno() if first and channel is not None else None,
            verify_placement=options.verify_placement,
        )


def _start_rank(start: _Start, env: RankEnv) -> Rank:
    """Start a rank, and register its pipes. Raises LaunchError."""
    log = None
    if start.options.log_dir is not None:
        log = start.stack.enter_context(open_log(start.options.log_dir, env.rank))
    report, report_end = os.pipe()
    spec = _write_spec(start, env, report_end)
    inherits = env.rank == 0 and log is None and not start.merges
    ours, theirs = ([], []) if inherits else _channels(start, env.rank)
    sockets = [fd for fd in (env.store_fd, env.channel_fd) if fd is not None]
    try:
        process = subprocess.Popen(
            [sys.executable, *path_flags(), str(CHECKOUT / "launcher" / "entry.py"), str(spec)],
            env={**os.environ, **rank_variables(env), **_own_variables(start)},
            pass_fds=[spec, report_end, *sockets],
            process_group=0,
            stdin=None if env.rank == 0 and env.channel_fd is None else subprocess.DEVNULL,
            stdout=theirs[0] if theirs else None,
            stderr=theirs[1] if theirs else None,
        )
    except OSError as error:
        for fd in (report, *ours):
            os.close(fd)
        raise LaunchError(f"rank {env.rank} cannot be started: {error}") from error
    finally:
        for fd in {spec, report_end, *theirs}:
            os.close(fd)
    rank = Rank(env.rank, process)
    _register(start.selector, report, rank.read_report)
    for fd, stream, outlet in zip(ours, (sys.stdout, sys.stderr), start.outlets, strict=False):
        if env.rank or (start.merges and not stream.isatty()):
            sink = whole_lines(env.rank, stream, outlet, log)
        else:
            sink = pieces(stream, outlet, log, fd if stream.isatty() else -1)
        _register(start.selector, fd, sink)
    return rank


def _register(selector: selectors.BaseSelector, fd: int, sink: Sink) -> None:
    selector.register(os.fdopen(fd, "rb", buffering=0), selectors.EVENT_READ, sink)


def _write_spec(start: _Start, env: RankEnv, report_fd: int) -> int:
    """What `launcher.child` reads first, in an anonymous file; returns its descriptor."""
    spec = {
        "env": env_to_json(env),
        "target": start.target,
        "payload": start.payload,
        "report_fd": report_fd,
        "parent_pid": os.getpid(),
        "beat_s": min(start.options.hang_timeout_s / 4, 5.0),
    }
    fd = os.memfd_create("yoke-rank")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(spec).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _own_variables(start: _Start) -> dict[str, str]:
    """The variables of a rank that are Yoke's own. The user's program keeps its own allocator settings
    and sys.path. For our own ranks PYTHONSAFEPATH keeps what they start (torch's compile workers) from
    importing modules of the current folder."""
    variables = {MARK: mark_of(start.session)}
    if start.target != PROGRAM:
        variables |= {**allocator_variables(os.environ), "PYTHONSAFEPATH": "1"}
    return variables


def path_flags() -> list[str]:
    """-P for an interpreter to start, if this one runs with it."""
    return ["-P"] if sys.flags.safe_path else []


def _channels(start: _Start, rank: int) -> tuple[list[int], list[int]]:
    """Our ends of a rank's output, and its ends of stdout and stderr. If ours are one file, it has one
    channel for both, so that what it prints stays in order."""
    streams = (sys.stdout, sys.stderr)[: 1 if start.outlets[0] is start.outlets[1] else 2]
    pairs = [open_channel(rank == 0 and stream.isatty()) for stream in streams]
    theirs = [pair[1] for pair in pairs]
    return [pair[0] for pair in pairs], [theirs[0], theirs[-1]]


def rank_variables(env: RankEnv) -> dict[str, str]:
    """The variables that torchrun would set for this rank; `init_process_group()` reads them."""
    values = {
        "RANK": str(env.rank),
        "WORLD_SIZE": str(env.world_size),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.local_world_size),
        "MASTER_ADDR": env.master_addr,
        "MASTER_PORT": str(env.master_port),
    }
    if env.master_addr == "127.0.0.1":
        # With all ranks on one machine, no host name has to resolve.
        values["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return values
