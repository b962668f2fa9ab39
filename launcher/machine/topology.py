"""The topology of the machine, reduced to what this process may use.

It is read from sysfs and proc (no numactl, lscpu or libnuma). A cpu or memory node may be used if both
the affinity mask and the cgroup allow it. With `root`, a recorded tree is read instead, with the mask
that was recorded. Ids are those of the operating system.

The parts: `cores` (packages, cores, L3 caches), `numa` (memory nodes), `gpus`, `cgroup`; `sysfs` reads
the files. What is not here: any decision about ranks (`plan`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from base.errors import LaunchError
from launcher.machine.cgroup import read_cgroup
from launcher.machine.cores import Core, read_cores, read_sockets
from launcher.machine.gpus import Gpu, gpu_memory_nodes, read_gpus
from launcher.machine.numa import Node, read_node_cpus, read_nodes
from launcher.machine.sysfs import (
    format_cpu_list,
    numbered,
    parse_cpu_list,
    prefix,
    read,
    read_int,
    read_list,
)

__all__ = [
    "Core",
    "Gpu",
    "Node",
    "Socket",
    "Topology",
    "format_cpu_list",
    "parse_cpu_list",
    "read_topology",
]


@dataclass(frozen=True)
class Socket:
    """A processor package and the allowed memory nodes that belong to it or serve its cpus.

    It is listed even if none of its cpus may be used, as long as one of its nodes may.
    """

    id: int
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """What this process may use. `notes` say which missing facts were replaced by a fallback."""

    sockets: tuple[Socket, ...]
    nodes: tuple[Node, ...]
    cores: tuple[Core, ...]
    gpus: tuple[Gpu, ...]
    allowed_cpus: tuple[int, ...]
    allowed_nodes: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read_topology(root: Path = Path("/"), visible_gpus: str | None = None) -> Topology:
    """Read the machine below `root`. Raises LaunchError for an inconsistent tree.

    `visible_gpus` is the value of CUDA_VISIBLE_DEVICES.
    """
    notes: list[str] = []
    base = prefix(root)
    cgroup = read_cgroup(root)
    mask = _affinity_mask(base)
    online = _online_cpus(base, mask, notes)
    allowed = _allowed_cpus(online, mask, cgroup.cpus, notes)
    mems = _allowed_mems(base, cgroup.nodes, notes)
    cpus_of = read_node_cpus(base, online, gpu_memory_nodes(base), notes)
    if not cpus_of:
        # The single node gets the lowest allowed id.
        only = min(mems or (0,))
        notes.append(
            f"{base}/sys/devices/system/node is missing: all cpus are treated as memory node {only}"
        )
        cpus_of = {only: online}
    cpus_of = _with_unlisted(cpus_of, online, notes)
    # Cpus that several nodes share get the lowest node that may be used.
    order = sorted(cpus_of, key=lambda node: (mems is None or node in mems, -node))
    node_of = {cpu: node for node in order for cpu in cpus_of[node]}
    socket_of = read_sockets(base, online, node_of, notes)
    cores = read_cores(base, online, allowed, node_of, socket_of, notes)
    existing = read_nodes(base, cpus_of, socket_of, allowed, notes)
    allowed_nodes = tuple(node.id for node in existing if mems is None or node.id in mems)
    if not allowed_nodes:
        raise LaunchError(
            f"memory nodes {format_cpu_list(cpus_of)} exist and {format_cpu_list(mems or ())} are "
            "allowed by Mems_allowed_list or the cpuset: none in common; allow one that exists"
        )
    # The kernel never lists a node without memory as allowed, but its cpus may be used.
    nodes = tuple(
        node
        for node in existing
        if node.id in allowed_nodes or (node.cpus and node.kind == "no-memory")
    )
    devices = "/dev" if root == Path("/") else None
    return Topology(
        _sockets(nodes, cores, cpus_of, socket_of),
        nodes,
        cores,
        read_gpus(base, allowed, visible_gpus, devices, notes),
        allowed,
        allowed_nodes,
        tuple(notes),
    )


def _affinity_mask(base: str) -> frozenset[int] | None:
    """The affinity mask of this process, or of the one that recorded the tree; None if unknown."""
    if not base:
        return frozenset(os.sched_getaffinity(0))
    listed = _status_list(base, "Cpus_allowed_list")
    return None if listed is None else frozenset(listed)


def _status_list(base: str, key: str) -> tuple[int, ...] | None:
    path = f"{base}/proc/self/status"
    match = re.search(rf"^{key}:[ \t]*(\S*)$", read(path) or "", re.MULTILINE)
    if match is None:
        return None
    try:
        return parse_cpu_list(match[1])
    except LaunchError as error:
        raise LaunchError(f"{path}, {key}: {error}") from None


def _online_cpus(base: str, mask: frozenset[int] | None, notes: list[str]) -> tuple[int, ...]:
    folder = f"{base}/sys/devices/system/cpu"
    described = numbered(folder, "cpu")
    online = read_list(f"{folder}/online")
    if online is None:
        # Old kernels have a file for each cpu; cpu 0 often cannot go offline and has none.
        online = tuple(cpu for cpu in described if read_int(f"{folder}/cpu{cpu}/online") != 0)
    if not online and not base:
        notes.append(f"{folder} lists no cpus: those of the affinity mask are used")
        online = tuple(sorted(mask or ()))
    if not online:
        raise LaunchError(f"{folder} lists no cpus; --sysfs must name a folder that holds sys/")
    absent = set(online) - set(described)
    if absent and len(absent) < len(online):
        notes.append(f"cpus {format_cpu_list(absent)} are online but not described: they are not used")
        online = tuple(cpu for cpu in online if cpu not in absent)
    return online


def _allowed_cpus(
    online: tuple[int, ...],
    mask: frozenset[int] | None,
    cpuset: tuple[int, ...] | None,
    notes: list[str],
) -> tuple[int, ...]:
    allowed = tuple(cpu for cpu in online if mask is None or cpu in mask)
    if not allowed:
        raise LaunchError(
            f"the affinity mask has cpus {format_cpu_list(mask or ())}, and the online cpus are "
            f"{format_cpu_list(online)}: none in common; start with another mask (taskset -p shows it)"
        )
    if cpuset is None:
        return allowed
    both = tuple(sorted(set(allowed).intersection(cpuset)))
    if not both:
        notes.append(
            f"the cgroup lists cpus {format_cpu_list(cpuset)}, but none of them can be used: "
            f"the affinity mask's {format_cpu_list(allowed)} are used"
        )
    return both or allowed


def _allowed_mems(
    base: str, cpuset: tuple[int, ...] | None, notes: list[str]
) -> tuple[int, ...] | None:
    """The memory nodes that may be used, whether they exist or not; None: all."""
    status = _status_list(base, "Mems_allowed_list")
    if status is None or cpuset is None:
        return status or cpuset
    both = tuple(sorted(set(status).intersection(cpuset)))
    if not both:
        notes.append(
            f"the cgroup lists memory nodes {format_cpu_list(cpuset)}, and Mems_allowed_list "
            f"{format_cpu_list(status)}: the latter are used"
        )
    return both or status


def _with_unlisted(
    cpus_of: dict[int, tuple[int, ...]], online: tuple[int, ...], notes: list[str]
) -> dict[int, tuple[int, ...]]:
    """`cpus_of`, with the cpus that no node lists added to the first node that has cpus."""
    unlisted = set(online).difference(*cpus_of.values())
    if not unlisted:
        return cpus_of
    first = min((node for node, cpus in cpus_of.items() if cpus), default=min(cpus_of))
    if len(cpus_of) > 1:
        notes.append(f"cpus {format_cpu_list(unlisted)} name no memory node: treated as {first}")
    return cpus_of | {first: tuple(sorted({*cpus_of[first], *unlisted}))}


def _sockets(
    nodes: tuple[Node, ...],
    cores: tuple[Core, ...],
    cpus_of: dict[int, tuple[int, ...]],
    socket_of: dict[int, int | None],
) -> tuple[Socket, ...]:
    served = {node.id: {node.socket, *(socket_of[cpu] for cpu in cpus_of[node.id])} for node in nodes}
    ids = {core.socket for core in cores} | {node.socket for node in nodes}
    return tuple(
        Socket(socket, tuple(node for node, sockets in served.items() if socket in sockets))
        for socket in sorted(id for id in ids if id is not None)
    )
