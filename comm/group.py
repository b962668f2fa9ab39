"""Which ranks work together, and through what.

A `Group` is a value that is passed to the layers that need it; there is no global one. `rank` and
`size` alone decide how weights are split, so a test can lay out rank 11 of 16 in a single process
with `Group(11, 16)`, which has no transport and refuses to communicate.

What is not here: several nodes and GPUs (one node's sockets only, for now).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from comm.errors import BuildError, CommError
from comm.shm import load_extension

# Each rank has two buffers of this size. A decode step moves a few KiB; larger messages go in pieces.
SLOT_BYTES = 512 * 1024


@dataclass(frozen=True)
class Group:
    """A rank's place among `size` ranks.

    `backend` is "shm" (then `handle` names the group to the operators), "gloo" (then `name` is the
    name of torch's process group), or "none" for a group that cannot communicate: one rank alone, or
    a layout that is only looked at.
    """

    rank: int
    size: int
    backend: str = "none"
    handle: int = 0
    name: str = ""


@dataclass(frozen=True)
class Rendezvous:
    """How the ranks of one run find each other.

    `session` is a random token shared by the ranks of the run. `store_fd` is a listening socket that
    rank 0 was handed, so that no port is ever guessed; None lets it bind `port` itself. `hosted` says
    that somebody else (torch's elastic agent) serves the store at that port.
    """

    session: str
    address: str = "127.0.0.1"
    port: int = 0
    store_fd: int | None = None
    hosted: bool = False


@contextmanager
def open_group(
    rank: int,
    size: int,
    backend: str,
    rendezvous: Rendezvous,
    timeout_s: float,
    on_fallback: Callable[[str], None] = lambda message: None,
) -> Iterator[Group]:
    """Join the group of all ranks, and leave it at the end of the block.

    `backend` is "shm" or "gloo". `timeout_s` bounds the wait for the others to join and, until
    `set_timeout`, each collective. Where the shared-memory operators cannot be compiled, gloo takes
    their place and `on_fallback` is told on rank 0. Raises CommError.
    """
    if size > 1 and backend == "shm":
        try:
            load_extension()
        except BuildError as error:
            # The ranks of a machine see the same compiler, so they all come here or none.
            backend = "gloo"
            if rank == 0:
                on_fallback(f"using gloo, which is slower, in place of shared memory: {error}")
    if size == 1:
        yield Group(0, 1)
    elif backend == "shm":
        name = f"yoke-{rendezvous.session}-0"
        try:
            handle = torch.ops.yoke.shm_open_group(name, rank, size, SLOT_BYTES, timeout_s)
        except RuntimeError as error:
            raise CommError(_first_line(error)) from error
        try:
            yield Group(rank, size, "shm", handle=handle)
        finally:
            torch.ops.yoke.shm_close_group(handle)
    elif backend == "gloo":
        yield from _open_gloo(rank, size, rendezvous, timeout_s)
    else:
        raise CommError(f"backend {backend!r} is not known; there are shm and gloo")


def _open_gloo(rank: int, size: int, rendezvous: Rendezvous, timeout_s: float) -> Iterator[Group]:
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            rendezvous.address,
            rendezvous.port,
            size,
            is_master=rank == 0 and not rendezvous.hosted,
            timeout=timeout,
            master_listen_fd=rendezvous.store_fd,
        )
        # The store may outlive a run (an elastic agent's does): each has its own names in it.
        own = dist.PrefixStore(rendezvous.session, store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise CommError(f"rank {rank} could not join gloo: {_first_line(error)}") from error
    world = dist.group.WORLD
    assert world is not None
    try:
        yield Group(rank, size, "gloo", name=world.group_name)
    finally:
        dist.destroy_process_group()


def set_timeout(group: Group, seconds: float) -> None:
    """Set how long a collective of this group waits for a peer before it raises."""
    if group.backend == "shm":
        torch.ops.yoke.shm_set_timeout(group.handle, seconds)
    elif group.backend == "gloo":
        world = dist.group.WORLD
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), world)


def _first_line(error: Exception) -> str:
    # torch appends a C++ stack to some messages.
    return str(error).strip().splitlines()[0]
