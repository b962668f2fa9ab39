"""Decide which rank runs where, and why, from the topology and the request.

The functions are pure: they read, bind and start nothing. The default is one rank per socket; sockets
that share a memory node count as one. Every allowed physical core is used, with one thread on each (a
second hardware thread only shares the first one's vector units and bandwidth). Each decision adds a
sentence to `reasons`.

What is not here: drawing (`launcher.draw`), memory sizes of models (the engine computes them).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby

from base.errors import LaunchError
from launcher.divide import divide, group_cores, join_shared, socket_of
from launcher.machine.topology import Core, Gpu, Topology, format_cpu_list
from launcher.share import Claim, free_units, left_cores, overlaps

MAX_RANKS = 1024  # of a shared-memory group (kMaxWorld in comm/csrc/channel.h)
_FEW_RANKS = 64  # up to this many may share a few cores, for experiments; more need a core each
BACKENDS = ("shm", "gloo", "nccl", "ccl", "deepspeed")
RANK_PER = ("socket", "node", "l3", "gpu")
MEMORY_POLICIES = ("bind", "preferred", "interleave", "none")


@dataclass(frozen=True)
class LaunchRequest:
    """What the flags ask for. None leaves the choice to the plan.

    `core_list` holds logical cpus; `reserve_cores` is the number of physical cores that no rank gets.
    `gpu_word`: how the user asked for a rank on each GPU, for errors. `claims`: what other runs are
    bound to; `share` takes only cores that these leave.
    """

    ranks: int | None = None
    rank_per: str | None = None
    bind_cores: bool = False
    core_list: tuple[int, ...] | None = None
    cores_per_rank: int | None = None
    reserve_cores: int = 0
    smt: bool = False
    numa_memory: str | None = None
    comm: str = "auto"
    gpu_word: str = "--rank-per gpu"
    share: bool = False
    claims: tuple[Claim, ...] = ()

    @property
    def binds(self) -> bool:
        """Whether ranks are bound: by --bind-cores-to-rank, or by a flag that places them."""
        return (
            self.bind_cores
            or self.rank_per is not None
            or self.core_list is not None
            or self.cores_per_rank is not None
            or self.numa_memory not in (None, "none")
            or self.reserve_cores > 0
            or self.smt
            or self.share
        )


@dataclass(frozen=True)
class RankPlan:
    """Where one rank runs. `device` is "cpu" or "cuda:<visible index>".

    `memory_policy` is how its pages are placed on `nodes`: "bind", "interleave", "preferred" (pages go
    to `preferred_nodes`; the other nodes take what does not fit) or "none" (first touch).
    """

    rank: int
    device: str
    nodes: tuple[int, ...]
    cpus: tuple[int, ...]
    num_threads: int
    memory_policy: str
    preferred_nodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class LaunchPlan:
    """All ranks, the transport between them, the cpus that are kept free, and the reasons."""

    ranks: tuple[RankPlan, ...]
    backend: str
    bind_cores: bool
    reasons: tuple[str, ...]
    reserved_cpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where a rank could go, and the name of that place in a reason."""

    name: str
    cores: tuple[Core, ...]
    gpu: Gpu | None = None


def plan_launch(topology: Topology, request: LaunchRequest) -> LaunchPlan:
    """Place the ranks. Raises LaunchError for a request that this machine cannot meet."""
    _check_request(request)
    _check_ranks(request.ranks, len(topology.cores))
    reasons = list(topology.notes)
    cores = _chosen_cores(topology, request, reasons)
    if request.share:
        cores = left_cores(cores, request.claims, reasons)
    elif request.binds and request.ranks and request.core_list is None and request.rank_per != "gpu":
        cores = free_units(cores, request.claims, request.ranks, request.rank_per, reasons)
    cores, reserved = _reserve(cores, request.reserve_cores, reasons)
    places = _places(topology, cores, request, reasons)
    if request.cores_per_rank is not None:
        places = [_first_cores(place, request.cores_per_rank, reasons) for place in places]
    sizes = {len(place.cores) for place in places}
    if len(sizes) > 1 and max(sizes) - min(sizes) > 1:
        reasons.append(
            f"ranks have {min(sizes)} to {max(sizes)} cores: each step waits for the slowest rank; "
            f"--cores-per-rank {min(sizes)} makes them equal"
        )
    if not request.binds:
        reasons.append("ranks are not bound to cores or memory; --bind-cores-to-rank binds them")
    keep_all_threads = request.smt or request.core_list is not None
    ranks = tuple(
        _place_rank(topology, rank, place, request, keep_all_threads, reasons)
        for rank, place in enumerate(places)
    )
    if request.binds:
        bound = [cpu for rank in ranks for cpu in rank.cpus]
        reasons += overlaps(topology.cores, bound, request.claims)
    backend = _backend(places, request, reasons)
    return LaunchPlan(ranks, backend, request.binds, tuple(dict.fromkeys(reasons)), reserved)


def _check_request(request: LaunchRequest) -> None:
    for flag, value, choices in (
        ("--comm", request.comm, ("auto", *BACKENDS)),
        ("--rank-per", request.rank_per, (None, *RANK_PER)),
        ("--numa-memory", request.numa_memory, (None, *MEMORY_POLICIES)),
    ):
        if value not in choices:
            names = [name for name in choices if name is not None]
            raise LaunchError(f"{flag} {value}: must be {', '.join(names[:-1])} or {names[-1]}")
    if request.cores_per_rank is not None and request.cores_per_rank < 1:
        raise LaunchError(f"--cores-per-rank {request.cores_per_rank}: a rank needs at least 1 core")
    if request.reserve_cores < 0:
        raise LaunchError(f"--reserve-cores {request.reserve_cores}: must be at least 0")


def _check_ranks(ranks: int | None, cores: int) -> None:
    most = min(max(cores, _FEW_RANKS), MAX_RANKS)
    if ranks is None or 1 <= ranks <= most:
        return
    why = f"{MAX_RANKS} is the limit of a shared-memory group"
    if most < MAX_RANKS:
        why = f"more than {_FEW_RANKS} need a core each, and this machine has {cores}"
    raise LaunchError(f"--ranks {ranks}: must be 1 to {most} here ({why})")


def _chosen_cores(topology: Topology, request: LaunchRequest, reasons: list[str]) -> tuple[Core, ...]:
    """All cores, or those of --bind-core-list with only the hardware threads that it names."""
    if request.core_list is None:
        if any(len(core.cpus) > 1 for core in topology.cores):
            reasons.append(
                "every hardware thread of each core is used (--smt)"
                if request.smt
                else "one thread per core: the first hardware thread of each (--smt uses all)"
            )
        if {core.kind for core in topology.cores} > {"efficiency"}:
            fast = [core.cpus[0] for core in topology.cores if core.kind != "efficiency"]
            reasons.append(
                "performance and efficiency cores work together; each step waits for the slower; "
                f"--bind-core-list {format_cpu_list(fast)} uses only the performance cores"
            )
        return topology.cores
    wanted = set(request.core_list)
    foreign = wanted - set(topology.allowed_cpus)
    if foreign or not wanted:
        raise LaunchError(
            f"--bind-core-list {format_cpu_list(wanted)}: this process may use cpus "
            f"{format_cpu_list(topology.allowed_cpus)}"
            + (f", not {format_cpu_list(foreign)}" if foreign else "")
        )
    cores = tuple(
        Core(core.id, core.socket, core.node, cpus, core.l3, core.kind)
        for core in topology.cores
        if (cpus := tuple(cpu for cpu in core.cpus if cpu in wanted))
    )
    reasons.append(f"only the cpus of --bind-core-list: {format_cpu_list(wanted)}")
    doubled = [core.cpus for core in cores if len(core.cpus) > 1]
    if doubled:
        reasons.append(
            f"--bind-core-list names several hardware threads of {len(doubled)} cores "
            f"(cpus {format_cpu_list(doubled[0])} are one core): they share its vector units"
        )
    return cores


def _reserve(
    cores: tuple[Core, ...], count: int, reasons: list[str]
) -> tuple[tuple[Core, ...], tuple[int, ...]]:
    """Reserve `count` cores: the last of each socket in turn, so that sockets keep equal counts."""
    if not count:
        return cores, ()
    if count >= len(cores):
        raise LaunchError(f"--reserve-cores {count}: of {len(cores)} cores, ranks need at least one")
    sockets = [list(group) for _, group in groupby(cores, key=socket_of)]
    reserved: list[Core] = []
    while len(reserved) < count:
        # From the socket with the most cores left; of equals, the last.
        reserved.append(max(reversed(sockets), key=len).pop())
    cpus = tuple(sorted(cpu for core in reserved for cpu in core.cpus))
    reasons.append(f"cpus {format_cpu_list(cpus)} are kept free (--reserve-cores {count})")
    return tuple(core for socket in sockets for core in socket), cpus


def _places(
    topology: Topology, cores: tuple[Core, ...], request: LaunchRequest, reasons: list[str]
) -> list[_Place]:
    """The cores (and the GPU, if any) of each rank."""
    if request.rank_per == "gpu":
        return _gpu_places(topology, cores, request, reasons)
    if topology.gpus:
        reasons.append(f"{len(topology.gpus)} GPUs are not used; --rank-per gpu puts one rank on each")
    units = group_cores(cores, request.rank_per or "socket", reasons)
    each = request.rank_per or "socket"
    if request.rank_per is None and len(whole := join_shared(units, reasons)) < len(units):
        units, each = whole, "socket, or sockets that share a memory node"
    count = request.ranks if request.ranks is not None else len(units)
    if count > MAX_RANKS:
        raise LaunchError(
            f"one rank per {each} would be {count} ranks, and a shared-memory group holds at most "
            f"{MAX_RANKS}: give --ranks N"
        )
    if count == len(units):
        reasons.append(f"one rank per {each}: {count}")
        return [_Place(f"{name}", unit) for name, unit in units]
    if request.rank_per is not None and count < len(units):
        unused = ", ".join(name for name, _ in units[count:])
        reasons.append(
            f"--ranks {count} with --rank-per {request.rank_per}: {unused} stay unused; "
            "without --rank-per their cores are used too"
        )
        return [_Place(name, unit) for name, unit in units[:count]]
    return [
        _Place(f"part {i + 1} of {count}", share)
        for i, share in enumerate(divide([unit for _, unit in units], count, reasons))
    ]


def _gpu_places(
    topology: Topology, cores: tuple[Core, ...], request: LaunchRequest, reasons: list[str]
) -> list[_Place]:
    """One rank per GPU, on the cores near it; GPUs with the same near cores divide them."""
    gpus = topology.gpus
    count = request.ranks if request.ranks is not None else len(gpus)
    if gpus and request.comm == "gloo" and count > len(gpus):
        # NCCL refuses two ranks on one GPU. gloo allows it, which serves tests of correctness.
        reasons.append(f"{count} ranks share {len(gpus)} GPUs: correct but slow")
        gpus = tuple(gpus[rank % len(gpus)] for rank in range(count))
    if not gpus or count > len(gpus):
        raise LaunchError(
            f"{request.gpu_word}: {len(gpus)} GPUs are visible"
            + (
                f", {count} ranks were asked for"
                if gpus
                else f" here; leave {request.gpu_word} out to run on the CPUs, or check the driver "
                "(nvidia-smi) and CUDA_VISIBLE_DEVICES"
            )
        )
    reasons.append(f"one rank per GPU, on the cores near it: {count}")
    near: dict[tuple[Core, ...], list[Gpu]] = {}
    for gpu in gpus[:count]:
        local = tuple(core for core in cores if set(core.cpus) & set(gpu.cpus))
        beside = {cpu for node in topology.nodes if node.id == gpu.node for cpu in node.cpus}
        local = local or tuple(core for core in cores if beside & set(core.cpus))
        if not local:
            reasons.append(f"gpu {gpu.index} ({gpu.pci}) lists no near cores: its rank may use any")
        near.setdefault(local or cores, []).append(gpu)
    places = [
        _Place(f"gpu {gpu.index}", share, gpu)
        for local, sharing in near.items()
        for gpu, share in zip(sharing, divide([local], len(sharing), reasons), strict=True)
    ]
    return sorted(places, key=lambda place: place.gpu.index if place.gpu else 0)


def _first_cores(place: _Place, count: int, reasons: list[str]) -> _Place:
    if count > len(place.cores):
        raise LaunchError(
            f"--cores-per-rank {count}: {place.name} has {len(place.cores)} cores for its rank; "
            "use fewer ranks or fewer cores"
        )
    if count < len(place.cores):
        reasons.append(
            f"{place.name}: {len(place.cores) - count} of {len(place.cores)} cores stay unused "
            f"(--cores-per-rank {count})"
        )
    return _Place(place.name, place.cores[:count], place.gpu)


def _place_rank(
    topology: Topology,
    rank: int,
    place: _Place,
    request: LaunchRequest,
    keep_all_threads: bool,
    reasons: list[str],
) -> RankPlan:
    threads = [core.cpus if keep_all_threads else core.cpus[:1] for core in place.cores]
    cpus = tuple(sorted(cpu for group in threads for cpu in group))
    device = "cpu" if place.gpu is None else f"cuda:{place.gpu.index}"
    near = _nodes_of(topology, place.cores)
    if not request.binds:
        nodes = _with_memory(topology, topology.allowed_nodes) or tuple(sorted(near))
        return RankPlan(rank, device, nodes, topology.allowed_cpus, len(cpus), "none")
    spans = len({core.node for core in place.cores}) > 1
    nodes, preferred, policy = _memory(topology, rank, near, spans, request.numa_memory, reasons)
    return RankPlan(rank, device, nodes, cpus, len(cpus), policy, preferred)


def _nodes_of(topology: Topology, cores: Collection[Core]) -> set[int]:
    """The memory nodes of these cores: each core's own node, and nodes that list the same cpus."""
    cpus = {cpu for core in cores for cpu in core.cpus}
    return {core.node for core in cores} | {
        node.id for node in topology.nodes if cpus.intersection(node.cpus)
    }


def _with_memory(topology: Topology, nodes: Collection[int]) -> tuple[int, ...]:
    allowed = set(topology.allowed_nodes)
    return tuple(
        node.id for node in topology.nodes if node.memory_bytes and node.id in allowed & set(nodes)
    )


def _memory(
    topology: Topology, rank: int, near: set[int], spans: bool, asked: str | None, reasons: list[str]
) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """A rank's memory nodes, the preferred ones among them, and its policy. `spans`: its cores are not
    all on one memory node."""
    own = _with_memory(topology, near)
    beside = [node for node in topology.nodes if node.near in near and node.memory_bytes]
    fast = tuple(node.id for node in beside if node.kind == "hbm")
    slow = [node for node in beside if node.kind != "hbm"]
    if slow:
        listed = ", ".join(f"{node.id} ({node.kind})" for node in slow)
        reasons.append(f"memory nodes without cpus are not used, as they are slower: {listed}")
    if not own and not fast:
        # Cores without memory of their own: use the nearest memory, if it is known.
        own = tuple(node.id for node in slow)
    nodes = tuple(sorted({*own, *fast}))
    if asked == "none" or not nodes:
        if not nodes:
            listed = format_cpu_list(near)
            reasons.append(
                f"rank {rank}: nodes {listed} have no memory that may be used; pages go to "
                f"nodes {format_cpu_list(topology.allowed_nodes)} by first touch"
            )
        return tuple(sorted(near)), (), "none"
    if asked == "preferred":
        return nodes, fast or own, "preferred"
    if asked is None and fast:
        reasons.append(
            f"HBM is preferred where it is near (rank {rank}: node {format_cpu_list(fast)}); what "
            "does not fit goes to the next node (--numa-memory bind treats DRAM and HBM alike)"
        )
        return nodes, fast, "preferred"
    if spans and len(own) > 1:
        reasons.append(
            f"rank {rank} spans the memory nodes {format_cpu_list(own)}: --rank-per node keeps each "
            "rank's memory beside its cores"
        )
    return nodes, (), asked or "bind"


def _backend(places: list[_Place], request: LaunchRequest, reasons: list[str]) -> str:
    on_gpus = all(place.gpu is not None for place in places)
    if request.comm == "nccl" and not on_gpus:
        raise LaunchError("--comm nccl works only between GPUs: add --rank-per gpu, or use --comm auto")
    if request.comm in ("shm", "ccl", "deepspeed") and on_gpus:
        raise LaunchError(
            f"--comm {request.comm} works only between cpus: use --comm auto (nccl between GPUs)"
        )
    backend = request.comm if request.comm != "auto" else "nccl" if on_gpus else "shm"
    if len(places) > 1:
        names = {"shm": "shared memory", "nccl": "NCCL", "ccl": "oneCCL", "deepspeed": "DeepSpeed"}
        reasons.append(f"{names.get(backend, backend)} between the ranks")
    return backend
