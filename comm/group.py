"""Which ranks work together, and through which transport.

A `Group` is a value that is passed to the layers that need it; there is no global group. `rank` and
`size` alone decide how weights are sharded. So a test can lay out rank 11 of 16 in a single process
with `Group(11, 16)`, which has no transport and refuses to communicate.

Transports: "shm" (our own shared memory, one machine), "gloo" (anywhere; the reference), "nccl"
(between GPUs), and "shm+gloo": shared memory inside each machine, gloo between one leader per machine.
"ccl" and "deepspeed" belong to other packages (`comm.optional`).

What is not here: the collectives (`comm.ops`), and starting the ranks (`launcher`).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from comm import optional
from comm.errors import BuildError, CommError, converting_errors
from comm.shm import first_line, join_segment, load_extension
from comm.store import SignedStore, agree_on_key, listen_at

BACKENDS = ("shm", "gloo", "nccl", "shm+gloo", *optional.NAMES)


@dataclass(frozen=True)
class Group:
    """A rank's place among `size` ranks.

    `backend` is the transport; "none" for a group that cannot communicate: a single rank, or a layout
    without processes. `handle` names a shared-memory group to the operators, `name` a torch process
    group. With "shm+gloo", `local` is the group of this machine's ranks, `leaders` the group of each
    machine's first rank (None on the other ranks), and `members` lists the ranks of each machine.
    """

    rank: int
    size: int
    backend: str = "none"
    handle: int = 0
    name: str = ""
    local: Group | None = None
    leaders: Group | None = None
    members: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Rendezvous:
    """How the ranks of one run find each other.

    `session`: a random token shared by the run's ranks on one machine. `store_fd`: a listening socket
    that rank 0 inherited, so that no free port has to be guessed; if None, rank 0 binds `port` itself.
    `hosted`: another process (torch's elastic agent) serves the store at that port. `node`: this
    machine's number among those of the run. `run`: the run's name on all machines (by default the
    session). `secret`: known to this run's ranks alone; values signed without it are refused (by
    default the session).
    """

    session: str
    address: str = "127.0.0.1"
    port: int = 0
    store_fd: int | None = None
    hosted: bool = False
    node: int = 0
    run: str = ""
    secret: str = ""


@dataclass(frozen=True)
class GroupOptions:
    """What few groups need. Those that are open at the same time need different labels. `device`: where
    the tensors are. `switch_bytes`: the largest message that shared memory sends in one step; 0
    measures it. Where gloo is used instead of shared memory, rank 0 calls `on_fallback` with the
    reason."""

    label: str = "0"
    device: str = "cpu"
    switch_bytes: int = 0
    on_fallback: Callable[[str], None] = field(default=lambda message: None, compare=False)


@dataclass(frozen=True)
class _Request:
    """The arguments of `open_group`."""

    rank: int
    size: int
    rendezvous: Rendezvous
    timeout_s: float
    options: GroupOptions


USUAL = GroupOptions()


@contextmanager
def open_group(
    rank: int,
    size: int,
    backend: str,
    rendezvous: Rendezvous,
    timeout_s: float,
    options: GroupOptions = USUAL,
) -> Iterator[Group]:
    """Join the group of all ranks, and leave it at the end of the block.

    `timeout_s` (seconds) bounds the wait for the others to join and, until `set_timeout`, each
    collective. If the shared-memory operators cannot be compiled, gloo is used instead. Raises
    CommError.
    """
    if backend not in BACKENDS:
        raise CommError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    asked = _Request(rank, size, rendezvous, timeout_s, options)
    if size > 1 and backend.startswith("shm") and not _has_extension(asked):
        backend = "gloo"
    with converting_errors(rank), ExitStack() as stack:
        if size == 1:
            yield Group(0, 1)
        elif backend == "shm":
            yield _open_shm(asked, options.label, rank, size, stack)
        elif backend == "shm+gloo":
            yield _open_machines(asked, stack)
        elif backend == "deepspeed":
            group = _open_torch(asked, "gloo", stack)
            optional.open_deepspeed(rank, size, rendezvous.session, rendezvous.node, group.name)
            yield replace(group, backend="deepspeed")
        else:
            if backend == "ccl":
                optional.load_ccl()
            yield _open_torch(asked, backend, stack)


def _has_extension(asked: _Request) -> bool:
    try:
        load_extension()
    except BuildError as error:
        # The ranks of a machine have the same compiler, so either all of them get here or none.
        if asked.rank == 0:
            asked.options.on_fallback(f"using gloo, which is slower, instead of shared memory: {error}")
        return False
    return True


def _open_shm(asked: _Request, label: str, rank: int, size: int, stack: ExitStack) -> Group:
    name = f"yoke-{asked.rendezvous.session}-{label}"
    handle = join_segment(name, rank, size, asked.timeout_s, asked.options.switch_bytes)
    stack.callback(torch.ops.yoke.shm_close_group, handle)
    return Group(rank, size, "shm", handle=handle)


def _open_torch(asked: _Request, backend: str, stack: ExitStack) -> Group:
    """Open a torch process group: the default one, or another if that is already open."""
    timeout = datetime.timedelta(seconds=asked.timeout_s)
    device = torch.device(asked.options.device)
    try:
        if dist.is_initialized():
            group = dist.new_group(backend=backend, timeout=timeout)
        else:
            store = _open_store(asked, backend, timeout)
            stack.callback(id, store)  # keeps a reference: torch does not keep the Python part alive
            dist.init_process_group(
                backend,
                store=store,
                rank=asked.rank,
                world_size=asked.size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            group = dist.group.WORLD
    except CommError:
        raise
    except RuntimeError as error:
        raise CommError(f"rank {asked.rank} could not join {backend}: {first_line(error)}") from error
    assert group is not None
    stack.callback(dist.destroy_process_group, group)
    return Group(asked.rank, asked.size, backend, name=group.group_name)


def _open_store(asked: _Request, backend: str, timeout: datetime.timedelta) -> Any:
    meeting = asked.rendezvous
    listener = meeting.store_fd
    hosts = asked.rank == 0 and not meeting.hosted
    if hosts and listener is None:  # by itself, torch would listen at every address
        listener = listen_at(meeting.address, meeting.port, asked.options.on_fallback)
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        meeting.address,
        meeting.port,
        asked.size,
        is_master=hosts,
        timeout=timeout,
        master_listen_fd=listener,
    )
    if meeting.hosted:  # the store outlives a run, so each run needs its own prefix
        name = f"yoke-{meeting.run or meeting.session}"
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    key = agree_on_key(store, asked.rank, asked.size, (meeting.secret or meeting.session).encode())
    if backend == "nccl":
        # NCCL's threads read the store at any time, even while Python exits: no Python store here.
        return dist.PrefixStore(key.hex(), store)  # type: ignore[attr-defined]
    return SignedStore(store, key)


def _open_machines(asked: _Request, stack: ExitStack) -> Group:
    """Shared memory inside each machine, gloo between their leaders."""
    world = _open_torch(asked, "gloo", stack)
    nodes = [torch.zeros(1, dtype=torch.int64) for _ in range(asked.size)]
    dist.all_gather(nodes, torch.tensor([asked.rendezvous.node]))
    machines: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        machines.setdefault(int(node), []).append(rank)
    members = tuple(tuple(ranks) for ranks in machines.values())
    own = next(ranks for ranks in members if asked.rank in ranks)
    if all(len(ranks) == 1 for ranks in members):
        return world
    place = own.index(asked.rank)
    label = f"{asked.options.label}-{asked.rendezvous.node}"
    local = Group(0, 1) if len(own) == 1 else _open_shm(asked, label, place, len(own), stack)
    first = [ranks[0] for ranks in members]
    # `new_group` is collective: every rank of the world must call it.
    between = dist.new_group(first, timeout=datetime.timedelta(seconds=asked.timeout_s))
    leaders = None
    if place == 0:
        assert between is not None
        stack.callback(dist.destroy_process_group, between)
        leaders = Group(first.index(asked.rank), len(first), "gloo", name=between.group_name)
    return Group(
        asked.rank,
        asked.size,
        "shm+gloo",
        name=world.name,
        local=local,
        leaders=leaders,
        members=members,
    )


def set_timeout(group: Group, seconds: float) -> None:
    """Set how many seconds a collective of this group waits for a peer before it raises."""
    if group.backend == "shm":
        torch.ops.yoke.shm_set_timeout(group.handle, seconds)
        return
    for part in (group.local, group.leaders):
        if part is not None:
            set_timeout(part, seconds)
    if group.name:
        found = dist.distributed_c10d._resolve_process_group(group.name)  # type: ignore
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), found)
