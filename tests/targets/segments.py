"""A /dev/shm that is too small, in which somebody else writes, or in which something is left.

`python -m tests.child segments CASE` makes the ranks and checks what they say.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from comm import ops
from comm.errors import CommError, SpaceError
from comm.group import Group
from comm.sizes import segment_bytes
from tests.targets.forking import Report, fork, new_session, run_forked, shm_group, stop, wait_for

SHM = Path("/dev/shm")


def little_memory() -> None:
    """/dev/shm is smaller than a group."""
    session = new_session()

    def body(rank: int, report: Report) -> str:
        with (
            pytest.raises(SpaceError if rank == 0 else CommError) as failure,
            shm_group(rank, 2, session, timeout_s=2.0),
        ):
            pass
        assert getattr(failure.value, "exit_code", 1) == (2 if rank == 0 else 1)
        return str(failure.value)

    said = run_forked(2, body)
    assert f"2 ranks need {segment_bytes(2) // 1024} KiB" in said[0], said
    assert "free some" in said[0] and "--shm-size" in said[0], said
    assert "rank 1 waited 2 s for rank 0 to create" in said[1], said
    assert not list(SHM.glob("yoke-*"))


def memory_that_is_taken() -> None:
    """/dev/shm has space when rank 0 checks, and none when rank 1 joins."""
    session = new_session()

    def body(rank: int, report: Report) -> str:
        with pytest.raises(CommError) as failure, shm_group(rank, 2, session, timeout_s=3.0):
            pass
        return f"{type(failure.value).__name__}: {failure.value}"

    first = fork(0, body)
    wait_for_segment(session, segment_bytes(2))
    room = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize
    (SHM / "filler").write_bytes(bytes(room - 64 * 1024))
    second = fork(1, body)
    try:
        said = [wait_for(rank, "returned", 20.0)["value"] for rank in (first, second)]
    finally:
        stop(first)
        stop(second)
        (SHM / "filler").unlink()
    assert said[1].startswith("SpaceError: cannot reserve ") and "--shm-size" in said[1], said
    assert said[0] == f"CommError: rank 0 waited 3 s for rank 1 to join the group yoke-{session}-0", (
        said
    )


def wait_for_segment(session: str, size: int) -> Path:
    path = SHM / f"yoke-{session}-0"
    deadline = time.monotonic() + 20
    while not path.exists() or path.stat().st_size != size or path.read_bytes()[:8] == bytes(8):
        assert time.monotonic() < deadline, "rank 0 makes no segment"
        time.sleep(0.005)
    return path


def join_and_sum(session: str, size: int, timeout_s: float = 20.0) -> Callable[[int, Report], str]:
    """A body that joins, sums and returns "joined", or what went wrong."""

    def body(rank: int, report: Report) -> str:
        try:
            with shm_group(rank, size, session, timeout_s=timeout_s) as group:
                assert ops.all_reduce(torch.ones(3), group).tolist() == [size] * 3
        except CommError as error:
            return str(error)
        return "joined"

    return body


def segment_of_another() -> None:
    """What lies there under the segment's name: garbage, of nobody or of somebody."""
    size = segment_bytes(2)
    for garbage in (b"\xff" * size, b"", os.urandom(100), os.urandom(size)):
        session = new_session()
        path = SHM / f"yoke-{session}-0"
        path.write_bytes(garbage)
        # Rank 1 is there before rank 0, and must wait for the right one.
        second = fork(1, join_and_sum(session, 2))
        time.sleep(0.1)
        first = fork(0, join_and_sum(session, 2))
        assert [wait_for(rank, "returned")["value"] for rank in (first, second)] == ["joined"] * 2
        stop(first)
        stop(second)
        assert not path.exists()
    for garbage, wanted in (
        (b"\xff" * size, "has a header that is not Yoke's for 2 ranks (magic ffffffffffffffff"),
        (os.urandom(size), "has a header that is not Yoke's for 2 ranks"),
        (os.urandom(size + 4096), f"has {size + 4096} bytes where rank 1 expects {size}"),
    ):
        session = new_session()
        path = SHM / f"yoke-{session}-0"
        path.write_bytes(garbage)
        with path.open("r+b") as file:  # somebody lives, and holds the first place
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
            first, second = run_forked(2, join_and_sum(session, 2, 2.0))
        assert first == f"{path} is in use: another run has the same session token", first
        assert wanted in second, second
        path.unlink()


def garbled_header() -> None:
    """Somebody writes into the segment between its making and the joining of the others."""
    for place, garbage, wanted in (
        (0, b"\x01" * 8, "magic 101010101010101"),
        (8, struct.pack("q", 77), "77 ranks"),
        (16, struct.pack("q", 1), "1 bytes"),
    ):
        session = new_session()
        first = fork(0, join_and_sum(session, 2, 2.0))
        path = wait_for_segment(session, segment_bytes(2))
        with path.open("r+b") as file:
            file.seek(place)
            file.write(garbage)
        second = fork(1, join_and_sum(session, 2, 2.0))
        said = [wait_for(rank, "returned")["value"] for rank in (first, second)]
        stop(first)
        stop(second)
        assert "has a header that is not Yoke's" in said[1] and wanted in said[1], said
        assert said[0].startswith("rank 0 waited 2 s for rank 1 to join"), said
        assert not path.exists()
    # The whole page, with the count of those who have joined.
    session = new_session()
    first = fork(0, join_and_sum(session, 2, 2.0))
    path = wait_for_segment(session, segment_bytes(2))
    with path.open("r+b") as file:
        file.write(b"\x55" * 4096)
    said = wait_for(first, "returned")["value"]
    stop(first)
    assert "header" in said, said
    assert not path.exists()


def stale_segment() -> None:
    """Rank 0 of a run was killed while it waited; the next run has the same name."""
    session = new_session()
    first = fork(0, join_and_sum(session, 2))
    path = wait_for_segment(session, segment_bytes(2))
    os.kill(first.pid, signal.SIGKILL)
    stop(first)
    assert path.exists()
    assert run_forked(2, join_and_sum(session, 2)) == ["joined", "joined"]
    assert not path.exists()


def foreign_segment() -> None:
    """The segment belongs to another user: nobody joins it."""
    session = new_session()
    path = SHM / f"yoke-{session}-0"
    path.write_bytes(bytes(segment_bytes(2)))
    os.chown(path, 65534, -1)
    try:
        rank = fork(1, join_and_sum(session, 2, 2.0))
        said = wait_for(rank, "returned")["value"]
        stop(rank)
    finally:
        path.unlink()
    assert said.endswith("(it belongs to user 65534, not to this one)"), said
    # A link to somewhere is not followed.
    session = new_session()
    path = SHM / f"yoke-{session}-0"
    target = SHM / f"{session}-target"
    target.write_bytes(bytes(segment_bytes(2)))
    path.symlink_to(target)
    try:
        rank = fork(1, join_and_sum(session, 2, 2.0))
        said = wait_for(rank, "returned")["value"]
        stop(rank)
        assert "it cannot be opened" in said, said
        assert run_forked(2, join_and_sum(session, 2)) == ["joined", "joined"]  # it replaces the link
        assert target.read_bytes() == bytes(segment_bytes(2))
    finally:
        target.unlink()
        path.unlink(missing_ok=True)


def mappings() -> list[str]:
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/yoke-" in line
    ]


def descriptors() -> set[str]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists
            found.add(f"{entry} -> {os.readlink(f'/proc/self/fd/{entry}')}")
    return found


def many_groups() -> None:
    """Groups that are made and closed leave nothing."""
    session = new_session()

    def body(rank: int, report: Report) -> None:
        torch.set_num_threads(1)
        ops.all_reduce(torch.ones(1), Group(0, 1))
        before, handles = descriptors(), set()
        for i in range(200):
            with shm_group(rank, 2, session, label=str(i % 7)) as group:
                handles.add(group.handle)
                ops.barrier(group)
                if i % 50 == 0:
                    # The last rank to join has removed the name; the memory is still there.
                    assert len(mappings()) == 1 and len(descriptors() - before) == 1, (
                        descriptors() - before
                    )
                    assert not list(SHM.glob(f"yoke-{session}*"))
                    ops.barrier(group)  # or the other makes its next segment already
        assert len(handles) == 200
        assert mappings() == [] and descriptors() == before, descriptors() - before

    run_forked(2, body)
    assert not list(SHM.glob(f"yoke-{session}*"))


CASES = {
    case.__name__: case
    for case in (
        little_memory, memory_that_is_taken, segment_of_another, garbled_header, stale_segment,
        foreign_segment, many_groups,
    )
}  # fmt: skip
