"""Memory nodes: their cpus, sizes, kinds of memory, and the nearest node with cpus.

The kind of a node without cpus (HBM, non-volatile, CXL memory) matters, because it is faster or slower
than DRAM. The kernel does not report the kind. It follows from the device that the memory came from
(DAX), else from the bandwidth that the firmware reports (HMAT).

What is not here: memory-side caches, and which node a rank should use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.machine.sysfs import format_cpu_list, names, numbered, read, read_cpus, read_int

# Ratios of read bandwidth to that of the nearest node with cpus: HBM has two to four times the
# bandwidth of DRAM, memory behind CXL a tenth to a half.
_FAST, _SLOW = 1.5, 0.67
# HMAT ranks the nodes with cpus near a memory: access0 counts accelerators too, access1 does not.
_ACCESS = ("access0", "access1")


@dataclass(frozen=True)
class Node:
    """A memory node; `socket` is None if the node serves several sockets or none is known.

    `cpus` are the usable ones; nodes that list the same cpus share them (`read_node_cpus`). `kind` is
    "dram", "hbm", "nvm", "cxl", "memory-only" (no cpus, kind unknown) or "no-memory". `near` is set for
    a node without cpus: the nearest node that has cpus.
    """

    id: int
    socket: int | None
    cpus: tuple[int, ...]
    memory_bytes: int
    kind: str
    near: int | None = None


def read_node_cpus(
    base: str, online: Collection[int], ignored: Collection[int], notes: list[str]
) -> dict[int, tuple[int, ...]]:
    """The online cpus that the kernel lists for each node; empty if it lists no nodes.

    A node keeps the cpus that no lower node lists. A node that would keep none shares all cpus that it
    lists: kernels that split the memory of a socket (numa=fake, old firmware) list its cpus in every
    part, and all parts are equally near. `ignored` nodes are left out unless they have cpus.
    """
    folder = f"{base}/sys/devices/system/node"
    known = set(online)
    owner: dict[int, int] = {}
    cpus_of: dict[int, tuple[int, ...]] = {}
    sharing: dict[tuple[int, ...], list[int]] = {}  # by shared cpus
    for node in numbered(folder, "node"):
        listed = read_cpus(f"{folder}/node{node}/cpumap", f"{folder}/node{node}/cpulist") or ()
        cpus = tuple(cpu for cpu in listed if cpu in known)
        own = tuple(cpu for cpu in cpus if owner.setdefault(cpu, node) == node)
        taken = sorted(set(cpus) - set(own))
        if taken and own:
            notes.append(
                f"nodes {owner[taken[0]]} and {node} both claim cpus {format_cpu_list(taken)}: "
                "the lower node keeps them"
            )
        elif taken:
            sharing.setdefault(cpus, sorted({owner[cpu] for cpu in taken})).append(node)
        if cpus or node not in ignored:
            cpus_of[node] = own or cpus
    for cpus, nodes in sharing.items():
        notes.append(
            f"memory nodes {format_cpu_list(nodes)} list the same cpus {format_cpu_list(cpus)}: "
            "ranks there use the memory of all of them"
        )
    return cpus_of


def read_nodes(
    base: str,
    cpus_of: Mapping[int, tuple[int, ...]],
    socket_of: Mapping[int, int | None],
    allowed_cpus: Collection[int],
    notes: list[str],
) -> tuple[Node, ...]:
    """All nodes of `cpus_of`. A node's socket is that of its online cpus, or of the nearest node with
    cpus."""
    usable = set(allowed_cpus)
    memory = _memory(base, tuple(cpus_of), notes)
    dax = _dax_kinds(base)
    sockets = {node: {socket_of[cpu] for cpu in cpus} or {None} for node, cpus in cpus_of.items()}
    with_cpus = [node for node, cpus in cpus_of.items() if cpus]
    nodes = []
    for node, cpus in cpus_of.items():
        near = () if cpus else _nearest(base, node, with_cpus)
        owners = {socket for other in near or (node,) for socket in sockets[other]}
        nodes.append(
            Node(
                node,
                next(iter(owners)) if len(owners) == 1 else None,
                tuple(cpu for cpu in cpus if cpu in usable),
                memory[node],
                _kind(base, node, dax.get(node), near) if memory[node] else "no-memory",
                min(near, default=None),
            )
        )
    return tuple(nodes)


def _memory(base: str, nodes: tuple[int, ...], notes: list[str]) -> dict[int, int]:
    """Bytes by node."""
    folder = f"{base}/sys/devices/system/node"
    memory = {node: _total(read(f"{folder}/node{node}/meminfo")) for node in nodes}
    total = _total(read(f"{base}/proc/meminfo"))
    filled = [node for node in nodes if memory[node]] or list(nodes)
    # Some virtual machines get more memory after their one node was counted. With several nodes it is
    # unknown which of them has the rest.
    if len(filled) == 1 and total > 1.05 * memory[filled[0]]:
        if memory[filled[0]]:
            notes.append(
                f"node {filled[0]} reports {memory[filled[0]] >> 20} MiB and /proc/meminfo "
                f"{total >> 20} MiB: the latter is used"
            )
        memory[filled[0]] = total
    return memory


def _total(meminfo: str | None) -> int:
    match = re.search(r"MemTotal:\s*([0-9]{1,15}) kB", meminfo or "")
    return int(match[1]) * 1024 if match else 0


def _nearest(base: str, node: int, with_cpus: list[int]) -> tuple[int, ...]:
    """The nodes with cpus that are nearest to a node without; several if they are equally near."""
    folder = f"{base}/sys/devices/system/node"
    for access in _ACCESS:
        linked = numbered(f"{folder}/node{node}/{access}/initiators", "node")
        if near := tuple(other for other in linked if other in with_cpus):
            return near
    distances = re.findall(r"\b[0-9]{1,9}\b", read(f"{folder}/node{node}/distance") or "")
    columns = numbered(folder, "node")
    if len(distances) != len(columns):
        return tuple(with_cpus)
    by_node = dict(zip(columns, map(int, distances), strict=True))
    best = min((by_node[other] for other in with_cpus), default=0)
    return tuple(other for other in with_cpus if by_node[other] == best)


def _dax_kinds(base: str) -> dict[int, str]:
    """For each node, the source of its memory: "nvm", "cxl" or "special" (reserved by the firmware)."""
    folder = f"{base}/sys/bus/dax/devices"
    kinds: dict[int, str] = {}
    for name in names(folder):
        node = read_int(f"{folder}/{name}/target_node")
        try:
            path = os.readlink(f"{folder}/{name}")
        except OSError:
            continue
        if "/ndbus" in path:
            kind = "nvm"
        elif "/hmem." in path:
            kind = "special"
        elif re.search(r"/(cxl|ACPI0017|decoder|dax_region|region)[^/]*/", path):
            kind = "cxl"
        else:
            continue
        if node is not None:
            kinds.setdefault(node, kind)
    return kinds


def _kind(base: str, node: int, dax: str | None, near: tuple[int, ...]) -> str:
    if dax in ("nvm", "cxl"):
        return dax
    if near:
        here, there = _read_bandwidth(base, node), _read_bandwidth(base, near[0])
        if here and there and here >= _FAST * there:
            return "hbm"
        if here and there and here <= _SLOW * there:
            return "cxl"
    if dax == "special":  # firmware reserves HBM for programs that ask for it
        return "hbm"
    return "memory-only" if near else "dram"


def _read_bandwidth(base: str, node: int) -> int | None:
    folder = f"{base}/sys/devices/system/node/node{node}"
    bandwidths = (read_int(f"{folder}/{access}/initiators/read_bandwidth") for access in _ACCESS)
    return next((number for number in bandwidths if number), None)
