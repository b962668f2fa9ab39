"""Divide cores into groups: by what they share, or into a number of parts. The functions are pure.

Parts are contiguous in the order of socket, node and cpu. They end at the borders of sockets and memory
nodes if the numbers allow it; if not, a sentence in `reasons` says so. Sockets that share a memory node
are one unit.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from base.errors import LaunchError
from launcher.machine.topology import Core, format_cpu_list

Units = list[tuple[str, tuple[Core, ...]]]  # the name and the cores of each unit


def socket_of(core: Core) -> tuple[int, int]:
    """A sort key of the core's socket. Cores without a socket count as one socket per memory node."""
    return (0, core.socket) if core.socket is not None else (1, core.node)


def group_cores(cores: tuple[Core, ...], rank_per: str, reasons: list[str]) -> Units:
    """The cores grouped by `rank_per` (socket, node or l3), with a name for each group. Raises
    LaunchError for l3 if no L3 caches are known."""

    def grouped(
        key: Callable[[Core], tuple[int, ...]], name: str
    ) -> list[tuple[str, tuple[Core, ...]]]:
        groups: dict[tuple[int, ...], list[Core]] = {}
        for core in cores:
            groups.setdefault(key(core), []).append(core)
        return [(f"{name} {place[-1]}", tuple(group)) for place, group in groups.items()]

    if rank_per == "socket":
        return grouped(socket_of, "socket")
    if rank_per == "node":
        return grouped(lambda core: (core.node,), "node")
    if all(core.l3 is None for core in cores):
        raise LaunchError("--rank-per l3: this machine lists no L3 caches; use --rank-per node")
    if any(core.l3 is None for core in cores):
        reasons.append("some cores list no L3 cache: they are grouped by memory node")
    return grouped(lambda core: (0, core.l3) if core.l3 is not None else (1, core.node), "l3 of cpu")


def join_shared(units: Units, reasons: list[str]) -> Units:
    """The units, with sockets that share a memory node joined: a rank for each of these would cost an
    all-reduce per layer without being nearer to memory. (Virtual machines often have a socket per cpu.)
    """
    joined: dict[int, Units] = {}  # joined units by the position of the first
    owner: dict[int, int] = {}  # for each memory node, the key in `joined` of the units that have it
    for position, unit in enumerate(units):
        nodes = {core.node for core in unit[1]}
        first, *others = sorted({owner[node] for node in nodes if node in owner}) or [position]
        joined.setdefault(first, [])
        for other in others:  # a socket with nodes of two units joins these
            joined[first] += joined.pop(other)
            nodes |= {node for node in owner if owner[node] == other}
        joined[first].append(unit)
        owner |= dict.fromkeys(nodes, first)
    whole: Units = []
    for part in joined.values():
        cores = tuple(core for _, own in part for core in own)
        name = part[0][0]
        if len(part) > 1:
            name = f"sockets {format_cpu_list({socket_of(core)[1] for core in cores})}"
            nodes = {core.node for core in cores}
            reasons.append(
                f"{name} share memory node {format_cpu_list(nodes)}: they are one unit "
                "(--rank-per socket puts a rank on each)"
            )
        whole.append((name, cores))
    return whole


def divide(units: list[tuple[Core, ...]], count: int, reasons: list[str]) -> list[tuple[Core, ...]]:
    """The cores of each rank, if the number of ranks differs from the number of units."""
    cores = tuple(core for unit in units for core in unit)
    if count > len(cores):
        reasons.append(
            f"{count} ranks share {len(cores)} cores, which is slow: use --ranks {len(cores)} or fewer"
        )
        return [(cores[rank % len(cores)],) for rank in range(count)]
    if count % len(units) == 0 and all(len(unit) >= count // len(units) for unit in units):
        return [share for unit in units for share in _split(unit, count // len(units), reasons)]
    if len(units) % count == 0:
        step = len(units) // count
        return [sum(units[i : i + step], ()) for i in range(0, len(units), step)]
    reasons.append(f"{count} ranks do not divide {len(units)} sockets or nodes: some ranks span two")
    return _split(cores, count, reasons)


def _split(cores: tuple[Core, ...], count: int, reasons: list[str]) -> list[tuple[Core, ...]]:
    """Contiguous parts; they end at borders of sockets and memory nodes if these divide evenly."""
    nodes = [tuple(group) for _, group in groupby(cores, key=lambda c: (socket_of(c), c.node))]
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
