"""What happens to the others when a rank dies, stops or finds something strange in /dev/shm.

`python -m tests.targets.faults CASE` makes the ranks, harms them, and checks what they say.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comm import ops
from comm.errors import CommError, SpaceError
from comm.group import Group, set_timeout
from comm.sizes import segment_bytes
from tests.targets.forking import Tell, fork, forked, new_session, run_forked, shm_group, stop, wait_for

SHM = Path("/dev/shm")


def operators(size: int) -> dict[str, Callable[[Group], Any]]:
    """Every operator, with a message that takes one step and one that takes many."""
    small, large = torch.ones(size, 5), torch.ones(size, 300_000)
    weight = torch.ones(5)

    def norm(group: Group) -> Any:
        return ops.all_reduce_add_rms_norm(small, small, weight, 1e-5, group)

    return {
        "all_reduce": lambda group: ops.all_reduce(small, group),
        "all_reduce, large": lambda group: ops.all_reduce(large, group),
        "reduce_scatter": lambda group: ops.reduce_scatter(large, group),
        "all_gather": lambda group: ops.all_gather(large, group),
        "broadcast": lambda group: ops.broadcast(large, size - 1, group),
        "barrier": ops.barrier,
        "all_reduce_add_rms_norm": norm,
        "argmax": lambda group: ops.argmax(small, 0, group),
        "topk": lambda group: ops.topk(small, 2, 0, group),
    }


def is_right(name: str, result: Any, size: int) -> bool:
    """Whether an operator on ones gave what it should, roughly: other tests look closely."""
    if name == "barrier":
        return True
    if name == "argmax":
        return bool((result == 0).all())
    if name == "topk":
        return bool((result[0] == 1).all())
    if name == "all_reduce_add_rms_norm":
        return bool((result[1] == size + 1).all())
    return bool((result == (size if "reduce" in name else 1)).all())


def check_killed(size: int, victim: int, name: str, moment: str) -> float:
    """Kill a rank and return how long the slowest of the others took to say so."""
    session = new_session()

    def body(rank: int, tell: Tell) -> None:
        torch.set_num_threads(1)
        operator = operators(size)[name]
        with shm_group(rank, size, session) as group:
            ops.barrier(group)
            if moment == "after":
                assert is_right(name, operator(group), size)
            if moment != "during" and rank == victim:
                tell("ready")
                time.sleep(60)
            if rank == victim:
                for _ in range(3):
                    operator(group)
                tell("ready")
            if moment == "before":
                operator(group)
            while True:
                operator(group)

    with forked(size, body) as ranks:
        wait_for(ranks[victim], "ready")
        time.sleep(0.1)
        os.kill(ranks[victim].pid, signal.SIGKILL)
        killed = time.monotonic()
        slowest = 0.0
        for rank in ranks:
            if rank.rank == victim:
                continue
            found = wait_for(rank, "raised", 10.0)
            assert found["kind"] == "PeerError", found
            wanted = (
                f"rank {rank.rank} waited for rank {victim} (pid {ranks[victim].pid}), which has died"
            )
            assert wanted in found["message"], found
            slowest = max(slowest, found["at"] - killed)
        assert slowest < 2.0, f"{name}, {moment}: noticed after {slowest:.2f} s"
    return slowest


def killed() -> None:
    """A rank is killed before, during and after each operator."""
    slowest = 0.0
    for i, name in enumerate(operators(2)):
        for j, moment in enumerate(("before", "during", "after")):
            size = 3 + (i + j) % 2
            slowest = max(slowest, check_killed(size, (i * 3 + j) % size, name, moment))
    print(f"a killed rank was named after {slowest:.2f} s at most")


def stopped() -> None:
    """A rank that is stopped is alive: the deadline names it."""
    session = new_session()

    def body(rank: int, tell: Tell) -> None:
        with shm_group(rank, 3, session) as group:
            set_timeout(group, 0.8)
            if rank == 1:
                tell("ready")
            while True:
                ops.all_reduce(torch.ones(100), group)

    with forked(3, body) as ranks:
        wait_for(ranks[1], "ready")
        time.sleep(0.1)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        for rank in (ranks[0], ranks[2]):
            found = wait_for(rank, "raised", 10.0)
            wanted = f"rank {rank.rank} waited 0.8 s for rank 1 (pid {ranks[1].pid}), which is at step "
            assert wanted in found["message"], found
        os.kill(ranks[1].pid, signal.SIGCONT)
        # Continued, it finds that the others have gone.
        assert "which has died" in wait_for(ranks[1], "raised", 10.0)["message"]


def broken() -> None:
    """After a failure, a group stays broken; another one works."""
    first, second = new_session(), new_session()

    def body(rank: int, tell: Tell) -> None:
        with shm_group(rank, 2, first) as group, shm_group(rank, 2, second) as other:
            with pytest.raises(RuntimeError, match="same collectives in the same order") as failure:
                ops.all_reduce(torch.ones(4 + rank), group)
            said = str(failure.value).splitlines()[0]
            for _ in range(2):
                with pytest.raises(RuntimeError, match="this group is broken since: ") as again:
                    ops.barrier(group)
                assert said in str(again.value)
            assert ops.all_reduce(torch.ones(4), other).tolist() == [2.0] * 4

    run_forked(2, body)


def little_memory() -> None:
    """/dev/shm is smaller than a group."""
    session = new_session()

    def body(rank: int, tell: Tell) -> str:
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
    """/dev/shm has room when rank 0 looks, and none when rank 1 comes."""
    session = new_session()

    def body(rank: int, tell: Tell) -> str:
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


def join_and_sum(session: str, size: int, timeout_s: float = 20.0) -> Callable[[int, Tell], str]:
    """A body that joins, sums and returns "joined", or what went wrong."""

    def body(rank: int, tell: Tell) -> str:
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

    def body(rank: int, tell: Tell) -> None:
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


def forked_child() -> None:
    """A child of a rank cannot use the rank's group, and does it no harm."""
    session, own = new_session(), new_session()

    def child(group: Group) -> Callable[[int, Tell], None]:
        def body(rank: int, tell: Tell) -> None:
            for call in (
                lambda: ops.all_reduce(torch.ones(3), group),
                lambda: ops.barrier(group),
                lambda: set_timeout(group, 1.0),
            ):
                with pytest.raises(
                    RuntimeError, match="belongs to the process that this one was forked"
                ):
                    call()
            assert mappings() == []
            # It can have groups of its own.
            with shm_group(group.rank, 2, own) as mine:
                assert ops.all_reduce(torch.ones(3), mine).tolist() == [2.0] * 3
            torch.ops.yoke.shm_close_group(group.handle)

        return body

    def body(rank: int, tell: Tell) -> None:
        torch.set_num_threads(1)
        with shm_group(rank, 2, session) as group:
            for _ in range(3):
                wait_for_child(child(group))
                if rank == 0:
                    time.sleep(0.8)  # the other looks whether this one lives, several times
                assert ops.all_reduce(torch.ones(3), group).tolist() == [2.0] * 3
                assert len(mappings()) == 1

    def wait_for_child(body: Callable[[int, Tell], None]) -> None:
        rank = fork(0, body)
        wait_for(rank, "returned")
        stop(rank)

    run_forked(2, body)


def closed() -> None:
    """Closing twice is fine; an operator on a closed group is an error; so is one of no group."""
    session = new_session()

    def body(rank: int, tell: Tell) -> None:
        with shm_group(rank, 2, session) as group:
            ops.barrier(group)
            torch.ops.yoke.shm_close_group(group.handle)
            for operator in operators(2).values():
                with pytest.raises(RuntimeError, match=r"group \d+ does not exist or was closed"):
                    operator(group)
            with pytest.raises(RuntimeError, match="does not exist or was closed"):
                set_timeout(group, 1.0)
        torch.ops.yoke.shm_close_group(group.handle)
        torch.ops.yoke.shm_close_group(12345)
        # Closed by one thread while another waits in it: the one that waits comes to its end.
        with shm_group(rank, 2, session, timeout_s=1.0, label="1") as group:
            ops.barrier(group)
            if rank == 0:
                said: list[str] = []

                def wait() -> None:
                    try:
                        ops.barrier(group)
                    except RuntimeError as error:
                        said.append(str(error))

                thread = threading.Thread(target=wait)
                thread.start()
                time.sleep(0.3)
                torch.ops.yoke.shm_close_group(group.handle)
                thread.join()
                assert "waited 1 s for rank 1" in said[0], said
                assert mappings() == []
            else:
                time.sleep(2.0)

    run_forked(2, body)


CASES = {
    case.__name__: case
    for case in (
        killed,
        stopped,
        broken,
        little_memory,
        memory_that_is_taken,
        segment_of_another,
        garbled_header,
        stale_segment,
        foreign_segment,
        many_groups,
        forked_child,
        closed,
    )
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
