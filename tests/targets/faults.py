"""What happens to the others when a rank dies, stops, forks or closes its group.

`python -m tests.child faults CASE` makes the ranks, harms them, and checks what they say.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from comm import ops
from comm.group import Group, set_timeout
from tests.targets.forking import (
    Report,
    fork,
    forked,
    new_session,
    run_forked,
    shm_group,
    stop,
    wait_for,
)
from tests.targets.segments import mappings


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
    """Whether an operator on ones gave roughly the right result; other tests check it exactly."""
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

    def body(rank: int, report: Report) -> None:
        torch.set_num_threads(1)
        operator = operators(size)[name]
        with shm_group(rank, size, session) as group:
            ops.barrier(group)
            if moment == "after":
                assert is_right(name, operator(group), size)
            if moment != "during" and rank == victim:
                report("ready")
                time.sleep(60)
            if rank == victim:
                for _ in range(3):
                    operator(group)
                report("ready")
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

    def body(rank: int, report: Report) -> None:
        with shm_group(rank, 3, session) as group:
            set_timeout(group, 0.8)
            if rank == 1:
                report("ready")
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

    def body(rank: int, report: Report) -> None:
        with shm_group(rank, 2, first) as group, shm_group(rank, 2, second) as other:
            with pytest.raises(RuntimeError, match="same collectives in the same order") as failure:
                ops.all_reduce(torch.ones(4 + rank), group)
            said = str(failure.value).splitlines()[0]
            for _ in range(2):
                with pytest.raises(RuntimeError, match="this group failed earlier ") as again:
                    ops.barrier(group)
                assert said in str(again.value)
            assert ops.all_reduce(torch.ones(4), other).tolist() == [2.0] * 4

    run_forked(2, body)


def forked_child() -> None:
    """A child of a rank cannot use the rank's group, and does it no harm."""
    session, own = new_session(), new_session()

    def child(group: Group) -> Callable[[int, Report], None]:
        def body(rank: int, report: Report) -> None:
            for call in (
                lambda: ops.all_reduce(torch.ones(3), group),
                lambda: ops.barrier(group),
                lambda: set_timeout(group, 1.0),
            ):
                with pytest.raises(
                    RuntimeError, match="belongs to the process from which this one was forked"
                ):
                    call()
            assert mappings() == []
            # It can have groups of its own.
            with shm_group(group.rank, 2, own) as mine:
                assert ops.all_reduce(torch.ones(3), mine).tolist() == [2.0] * 3
            torch.ops.yoke.shm_close_group(group.handle)

        return body

    def body(rank: int, report: Report) -> None:
        torch.set_num_threads(1)
        with shm_group(rank, 2, session) as group:
            for _ in range(3):
                wait_for_child(child(group))
                if rank == 0:
                    time.sleep(0.8)  # the other rank checks several times whether this one is alive
                assert ops.all_reduce(torch.ones(3), group).tolist() == [2.0] * 3
                assert len(mappings()) == 1

    def wait_for_child(body: Callable[[int, Report], None]) -> None:
        rank = fork(0, body)
        wait_for(rank, "returned")
        stop(rank)

    run_forked(2, body)


def closed() -> None:
    """Closing twice is fine; an operator on a closed group is an error; so is one of no group."""
    session = new_session()

    def body(rank: int, report: Report) -> None:
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


CASES = {case.__name__: case for case in (killed, stopped, broken, forked_child, closed)}
