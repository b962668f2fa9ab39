"""What the machine is made of: sockets, memory nodes, physical cores, GPUs.

Read from sysfs and proc (no numactl, lscpu or libnuma), and reduced to what this process may use: the
affinity mask and the memory nodes that its cgroup allows. `root` reads a recorded tree instead.
Ids are the operating system's own.

What is not here: caches, hybrid core kinds, distances between nodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LaunchError


@dataclass(frozen=True)
class Socket:
    """A processor package and the memory nodes of its cores."""

    id: int
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A memory node; `socket` is None where it has no cpus or serves several sockets.

    `kind` is "dram", "memory-only" (no cpus: HBM, CXL) or "no-memory".
    """

    id: int
    socket: int | None
    cpus: tuple[int, ...]
    memory_bytes: int
    kind: str


@dataclass(frozen=True)
class Core:
    """A physical core; `cpus` are its usable logical cpus, first hardware thread first."""

    id: int
    socket: int
    node: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU by its PCI address, and the node it is attached to (None: not told)."""

    index: int
    pci: str
    node: int | None


@dataclass(frozen=True)
class Topology:
    """What this process may use. `notes` say where a fallback stands in for a missing file."""

    sockets: tuple[Socket, ...]
    nodes: tuple[Node, ...]
    cores: tuple[Core, ...]
    gpus: tuple[Gpu, ...]
    allowed_cpus: tuple[int, ...]
    allowed_nodes: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read_topology(root: Path = Path("/")) -> Topology:
    """The machine below `root`. Raises LaunchError for a tree that makes no sense."""
    notes: list[str] = []
    cpu_dir = root / "sys/devices/system/cpu"
    online = _read_list(cpu_dir / "online")
    if online is None:
        # Old kernels tell it cpu by cpu; the first often cannot be taken offline and says nothing.
        online = tuple(
            cpu for cpu in _numbered(cpu_dir, "cpu") if _read_int(cpu_dir / f"cpu{cpu}/online") != 0
        )
    if not online:
        raise LaunchError(f"{cpu_dir} lists no cpus; --sysfs must name a folder that holds sys/")
    allowed = _allowed_cpus(root, online)
    if not allowed:
        raise LaunchError("the affinity mask and the online cpus have no cpu in common")
    node_of, memory = _read_nodes(root, online, notes)
    cores = _read_cores(cpu_dir, allowed, node_of, notes)
    allowed_nodes = _allowed_nodes(root, tuple(memory))
    nodes = []
    for node in sorted(memory):
        cpus = tuple(cpu for cpu in allowed if node_of.get(cpu) == node)
        if cpus or node in allowed_nodes:
            has_cpus = any(owner == node for owner in node_of.values())
            kind = "no-memory" if not memory[node] else "dram" if has_cpus else "memory-only"
            owners = {core.socket for core in cores if core.node == node}
            socket = owners.pop() if len(owners) == 1 else None
            nodes.append(Node(node, socket, cpus, memory[node], kind))
    sockets = tuple(
        Socket(socket, tuple(sorted({core.node for core in cores if core.socket == socket})))
        for socket in sorted({core.socket for core in cores})
    )
    gpus = _read_gpus(root)
    return Topology(sockets, tuple(nodes), cores, gpus, allowed, allowed_nodes, tuple(notes))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """ "0-3,8" -> (0, 1, 2, 3, 8), sorted. Raises LaunchError."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if match is None:
            raise LaunchError(f"{text.strip()!r} is not a list of cpus such as 0-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise LaunchError(f"{part!r} in a list of cpus: the range runs backwards")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def format_cpu_list(numbers: Iterable[int]) -> str:
    """(0, 1, 2, 3, 8) -> "0-3,8"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _read(path: Path) -> str | None:
    try:
        # Some firmware-written files end in a NUL.
        return path.read_text(encoding="ascii", errors="replace").strip("\0 \n\t")
    except OSError:
        return None


def _read_list(path: Path) -> tuple[int, ...] | None:
    text = _read(path)
    return None if text is None else parse_cpu_list(text)


def _read_int(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def _numbered(folder: Path, prefix: str) -> tuple[int, ...]:
    """The numbers N of the entries `<prefix>N`."""
    if not folder.is_dir():
        return ()
    names = (re.fullmatch(rf"{prefix}(\d+)", entry.name) for entry in folder.iterdir())
    return tuple(sorted(int(match[1]) for match in names if match))


def _allowed_cpus(root: Path, online: tuple[int, ...]) -> tuple[int, ...]:
    if root == Path("/"):
        mask = os.sched_getaffinity(0)  # the cgroup's cpuset is already in it
    else:
        listed = _status_list(root, "Cpus_allowed_list")
        mask = set(online if listed is None else listed)
    return tuple(cpu for cpu in online if cpu in mask)


def _allowed_nodes(root: Path, present: tuple[int, ...]) -> tuple[int, ...]:
    listed = _status_list(root, "Mems_allowed_list")
    return tuple(sorted(node for node in present if listed is None or node in listed))


def _status_list(root: Path, key: str) -> tuple[int, ...] | None:
    match = re.search(rf"^{key}:\s*(\S*)$", _read(root / "proc/self/status") or "", re.MULTILINE)
    return None if match is None else parse_cpu_list(match[1])


def _read_nodes(
    root: Path, online: tuple[int, ...], notes: list[str]
) -> tuple[dict[int, int], dict[int, int]]:
    """The node of each cpu, and the bytes of memory of each node."""
    folder = root / "sys/devices/system/node"
    node_of: dict[int, int] = {}
    memory: dict[int, int] = {}
    for node in _numbered(folder, "node"):
        for cpu in _read_list(folder / f"node{node}/cpulist") or ():
            node_of[cpu] = node
        memory[node] = _memory_bytes(_read(folder / f"node{node}/meminfo"))
    if not memory:
        notes.append(f"{folder} is missing: all cpus are taken as one memory node 0")
        memory[0] = _memory_bytes(_read(root / "proc/meminfo"))
    homeless = [cpu for cpu in online if cpu not in node_of]
    for cpu in homeless:
        node_of[cpu] = min(memory)
    if homeless and len(memory) > 1:
        notes.append(
            f"cpus {format_cpu_list(tuple(homeless))} name no memory node: taken as {min(memory)}"
        )
    return node_of, memory


def _memory_bytes(meminfo: str | None) -> int:
    match = re.search(r"MemTotal:\s*(\d+) kB", meminfo or "")
    return int(match[1]) * 1024 if match else 0


def _read_cores(
    cpu_dir: Path, allowed: tuple[int, ...], node_of: dict[int, int], notes: list[str]
) -> tuple[Core, ...]:
    """Physical cores, grouped by the siblings that each cpu lists, ordered by socket, node and cpu."""
    threads: dict[tuple[int, int, int], list[int]] = {}
    unknown: list[int] = []
    for cpu in allowed:
        topology = cpu_dir / f"cpu{cpu}/topology"
        socket = _read_int(topology / "physical_package_id")
        if socket is None or socket < 0:
            # Some Arm kernels and containers tell nothing: a memory node is the best guess.
            unknown.append(cpu)
            socket = node_of[cpu]
        siblings = _read_list(topology / "core_cpus_list") or _read_list(
            topology / "thread_siblings_list"
        )
        threads.setdefault((socket, node_of[cpu], min(siblings or (cpu,))), []).append(cpu)
    if unknown:
        notes.append(
            f"cpus {format_cpu_list(tuple(unknown))} name no socket: each memory node is taken as one"
        )
    return tuple(
        Core(index, socket, node, tuple(sorted(cpus)))
        for index, ((socket, node, _), cpus) in enumerate(sorted(threads.items()))
    )


def _read_gpus(root: Path) -> tuple[Gpu, ...]:
    """NVIDIA devices of the display classes, in PCI order."""
    folder = root / "sys/bus/pci/devices"
    found: list[tuple[str, int | None]] = []
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind = _read(device / "class") or ""
        if _read(device / "vendor") == "0x10de" and kind.startswith(("0x0300", "0x0302")):
            node = _read_int(device / "numa_node")
            found.append((device.name, None if node is None or node < 0 else node))
    return tuple(Gpu(index, pci, node) for index, (pci, node) in enumerate(found))
