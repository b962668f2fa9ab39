"""Topology and request -> which rank runs where. Pure: nothing is read, bound or started here.

One rank per socket unless `--ranks` says otherwise; every physical core that is allowed is used, one
thread on each (a second hardware thread only shares the first one's vector units and bandwidth).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from launcher.errors import LaunchError
from launcher.topology import Core, Topology, format_cpu_list

MAX_RANKS = 64
BACKENDS = ("shm", "gloo")


@dataclass(frozen=True)
class LaunchRequest:
    """What the flags ask for. `ranks` None is one per socket; times are in seconds."""

    ranks: int | None = None
    bind_cores: bool = False
    comm: str = "auto"
    comm_timeout_s: float = 60.0
    grace_s: float = 5.0


@dataclass(frozen=True)
class RankPlan:
    """One rank's place. `memory_policy` is "bind" (to `nodes`) or "none" (first touch)."""

    rank: int
    device: str
    nodes: tuple[int, ...]
    cpus: tuple[int, ...]
    num_threads: int
    memory_policy: str


@dataclass(frozen=True)
class LaunchPlan:
    """All ranks, the transport between them, and why it is so."""

    ranks: tuple[RankPlan, ...]
    backend: str
    bind_cores: bool
    reasons: tuple[str, ...]


def make_plan(topology: Topology, request: LaunchRequest) -> LaunchPlan:
    """Place the ranks. Raises LaunchError for a request that no machine could meet."""
    reasons = list(topology.notes)
    count = request.ranks if request.ranks is not None else len(topology.sockets)
    if not 1 <= count <= MAX_RANKS:
        raise LaunchError(f"--ranks {count}: there can be 1 to {MAX_RANKS} ranks")
    if request.comm not in ("auto", *BACKENDS):
        raise LaunchError(f"--comm {request.comm}: must be auto, {' or '.join(BACKENDS)}")
    if request.ranks is None:
        reasons.append(f"one rank per socket: {count}")
    shares = _shares(topology, count, reasons)
    has_memory = {
        node.id for node in topology.nodes if node.memory_bytes and node.id in topology.allowed_nodes
    }
    if not request.bind_cores:
        reasons.append("ranks are not bound to cores or memory; --bind-cores-to-rank binds them")
    ranks = []
    for rank, cores in enumerate(shares):
        nodes = tuple(sorted({core.node for core in cores}))
        policy = "none"
        if request.bind_cores:
            policy = "bind" if has_memory.issuperset(nodes) else "none"
            if policy == "none":
                reasons.append(f"rank {rank}: nodes {format_cpu_list(nodes)} have no memory to bind to")
        cpus = tuple(sorted(core.cpus[0] for core in cores))
        if not request.bind_cores:
            cpus, nodes = topology.allowed_cpus, tuple(sorted(has_memory)) or nodes
        ranks.append(RankPlan(rank, "cpu", nodes, cpus, len(cores), policy))
    backend = "shm" if request.comm == "auto" else request.comm
    if count > 1:
        reasons.append(
            "shared memory between the ranks" if backend == "shm" else "gloo between the ranks"
        )
    return LaunchPlan(tuple(ranks), backend, request.bind_cores, tuple(reasons))


def _shares(topology: Topology, count: int, reasons: list[str]) -> list[tuple[Core, ...]]:
    """The cores of each rank."""
    cores = topology.cores  # in the order of socket, node, cpu
    if count > len(cores):
        reasons.append(
            f"{count} ranks share {len(cores)} cores, which is slow: use --ranks {len(cores)} or fewer"
        )
        return [(cores[rank % len(cores)],) for rank in range(count)]
    sockets = [tuple(group) for _, group in groupby(cores, key=lambda core: core.socket)]
    if count % len(sockets) == 0 and all(len(socket) >= count // len(sockets) for socket in sockets):
        return [share for socket in sockets for share in _split(socket, count // len(sockets), reasons)]
    if len(sockets) % count == 0:
        step = len(sockets) // count
        return [sum(sockets[i : i + step], ()) for i in range(0, len(sockets), step)]
    reasons.append(f"{count} ranks do not divide {len(sockets)} sockets: some rank spans two")
    return _split(cores, count, reasons)


def _split(cores: tuple[Core, ...], count: int, reasons: list[str]) -> list[tuple[Core, ...]]:
    """Contiguous parts, on the borders of memory nodes where these divide evenly."""
    nodes = [tuple(group) for _, group in groupby(cores, key=lambda core: core.node)]
    if count < len(nodes) and len(nodes) % count == 0:
        step = len(nodes) // count
        return [sum(nodes[i : i + step], ()) for i in range(0, len(nodes), step)]
    if len(nodes) > 1 and count % len(nodes) == 0:
        per_node = count // len(nodes)
        if all(len(node) >= per_node for node in nodes):
            return [share for node in nodes for share in _split(node, per_node, reasons)]
    size, remainder = divmod(len(cores), count)
    if remainder:
        reasons.append(f"{len(cores)} cores over {count} ranks: the first {remainder} have one more")
    sizes = [size + (rank < remainder) for rank in range(count)]
    starts = [sum(sizes[:rank]) for rank in range(count)]
    return [cores[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def plan_to_json(topology: Topology, plan: LaunchPlan) -> dict[str, Any]:
    """The plan for programs; `cpus` are lists of logical cpu numbers, memory is in bytes."""
    machine = asdict(topology)
    del machine["notes"]  # they are among the reasons
    return {
        "topology": machine,
        "ranks": [asdict(rank) for rank in plan.ranks],
        "backend": plan.backend,
        "reasons": list(plan.reasons),
    }


def render_plan(topology: Topology, plan: LaunchPlan) -> str:
    """The plan for people: the machine, the ranks on it, and why."""
    lines = ["Machine"]
    for socket in topology.sockets:
        lines.append(f"  socket {socket.id}")
        for node in topology.nodes:
            if node.socket == socket.id:
                cores = sum(core.node == node.id for core in topology.cores)
                lines.append(
                    f"    node {node.id}  {node.memory_bytes / 2**30:7.1f} GiB  {node.kind:<9}"
                    f"  {cores} cores, cpus {format_cpu_list(node.cpus)}"
                )
    for node in topology.nodes:
        if node.socket is None:
            cpus = f"cpus {format_cpu_list(node.cpus)}" if node.cpus else "no cpus"
            lines.append(
                f"  node {node.id}  {node.memory_bytes / 2**30:9.1f} GiB  {node.kind:<11}  {cpus}"
            )
    for gpu in topology.gpus:
        lines.append(f"  gpu {gpu.index}  {gpu.pci}  node {gpu.node}")
    lines.append(f"Ranks ({plan.backend})")
    for rank in plan.ranks:
        where = f"cpus {format_cpu_list(rank.cpus)}"
        memory = f"memory {rank.memory_policy} {format_cpu_list(rank.nodes)}"
        bound = "bound to" if plan.bind_cores else "free on"
        lines.append(f"  rank {rank.rank}  {rank.num_threads} threads, {bound} {where}, {memory}")
    lines.append("Why")
    lines.extend(f"  - {reason}" for reason in plan.reasons)
    return "\n".join(lines)
