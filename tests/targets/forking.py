"""Ranks that are forked from one process, which has imported torch once: many groups in little time.

The process that forks makes no tensors: its children start torch's threads each for themselves.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from comm.group import Group, GroupOptions, Rendezvous, open_group
from comm.shm import load_extension

# A rank's reports while it runs: `report("ready")`.
Report = Callable[[str], None]
Body = Callable[[int, Report], Any]


@dataclass
class Rank:
    """A child. Its pipe carries a JSON line for each report, and a last one for its end."""

    rank: int
    pid: int
    pipe: int
    unread: bytes = b""
    reports: list[dict[str, Any]] = field(default_factory=list)
    status: int | None = None


def new_session() -> str:
    return "test" + secrets.token_hex(8)


@contextmanager
def forked(size: int, body: Body) -> Iterator[list[Rank]]:
    """Runs `body(rank, report)` in a process each; kills what is left of them at the end."""
    load_extension()
    ranks = [fork(rank, body) for rank in range(size)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            stop(rank)


def fork(number: int, body: Body) -> Rank:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Rank(number, pid, reading)

    def report(what: str, **facts: Any) -> None:
        os.write(writing, json.dumps({"what": what, "at": time.monotonic(), **facts}).encode() + b"\n")

    code = 1
    try:
        report("returned", value=body(number, report))
        code = 0
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        trace = traceback.format_exc()[-3000:]
        report("raised", kind=type(error).__name__, message=lines[0][:2000], traceback=trace)
    finally:
        os._exit(code)


def stop(rank: Rank) -> None:
    if rank.status is None:
        with suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)
        rank.status = os.waitpid(rank.pid, 0)[1]
        os.close(rank.pipe)


def wait_for(rank: Rank, what: str, seconds: float = 60.0) -> dict[str, Any]:
    """The next report of the rank; it must be `what`."""
    deadline = time.monotonic() + seconds
    while not rank.reports:
        ready, _, _ = select.select([rank.pipe], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"rank {rank.rank} reported nothing for {seconds} s"
        data = os.read(rank.pipe, 1 << 16)
        assert data, f"rank {rank.rank} ended without a word"
        *lines, rank.unread = (rank.unread + data).split(b"\n")
        rank.reports += [json.loads(line) for line in lines]
    found = rank.reports.pop(0)
    assert found["what"] == what, f"rank {rank.rank}: {found.get('traceback') or found}"
    return found


def run_forked(size: int, body: Body, seconds: float = 120.0) -> list[Any]:
    """Runs `body` in `size` ranks, all of which must return; what they returned."""
    with forked(size, body) as ranks:
        # The first to end first: if one fails, the others fail for want of it.
        values: dict[int, Any] = {}
        while len(values) < size:
            pipes = {rank.pipe: rank for rank in ranks if rank.rank not in values}
            ready, _, _ = select.select(list(pipes), [], [], seconds)
            assert ready, (
                f"ranks {[rank.rank for rank in pipes.values()]} reported nothing for {seconds} s"
            )
            for pipe in ready:
                rank = pipes[pipe]
                values[rank.rank] = wait_for(rank, "returned", seconds)["value"]
        return [values[number] for number in range(size)]


@contextmanager
def shm_group(
    rank: int,
    size: int,
    session: str,
    timeout_s: float = 60.0,
    label: str = "0",
    switch_bytes: int = 1 << 30,
) -> Iterator[Group]:
    """A shared-memory group with a session of its own."""
    with open_group(
        rank,
        size,
        "shm",
        Rendezvous(session),
        timeout_s,
        GroupOptions(label, switch_bytes=switch_bytes),
    ) as group:
        if size > 1:
            assert group.backend == "shm"
        yield group


def listen() -> socket.socket:
    """A socket for gloo's store, to be handed to rank 0."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(128)
    return server
