"""Small sysfs and proc trees, written by tests: what a machine describes, as a dict of path to text;
and plans for such machines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.machine.topology import Topology
from launcher.plan import LaunchPlan, LaunchRequest, plan_launch

CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"
GPU_UUIDS = ("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def two_sockets(threads: int = 2, cores: int = 8) -> dict[str, str]:
    """Two sockets of two nodes, each with its L3; the second hardware threads are numbered last."""
    total = cores * threads
    files = {f"{CPU}/online": f"0-{total - 1}"}

    def listed(first: int, last: int) -> str:
        """These cores, with all their hardware threads."""
        return ",".join(f"{first + cores * i}-{last + cores * i}" for i in range(threads))

    for cpu in range(total):
        core = cpu % cores
        folder = f"{CPU}/cpu{cpu}"
        half, quarter = core * 2 // cores, core * 4 // cores
        files[f"{folder}/topology/physical_package_id"] = str(half)
        files[f"{folder}/topology/core_id"] = str(core)
        package = listed(half * cores // 2, (half + 1) * cores // 2 - 1)
        files[f"{folder}/topology/package_cpus_list"] = package
        files[f"{folder}/topology/thread_siblings_list"] = listed(core, core)
        files[f"{folder}/cache/index3/level"] = "3"
        shared = listed(quarter * cores // 4, (quarter + 1) * cores // 4 - 1)
        files[f"{folder}/cache/index3/shared_cpu_list"] = shared
    for node in range(4):
        files[f"{NODE}/node{node}/cpulist"] = listed(node * cores // 4, (node + 1) * cores // 4 - 1)
        files |= memory(node, 1024 * (node + 1))
    return files


class Cpu(NamedTuple):
    """Where a cpu is: `core` counts within its socket, `l3` numbers the L3 caches of the machine."""

    socket: int
    node: int
    core: int
    l3: int | None = None


def machine(cpus: Sequence[Cpu], offline: Collection[int] = ()) -> dict[str, str]:
    """These cpus, numbered in this order, and 1 GiB on each of their nodes. As in sysfs, an offline cpu
    has a folder without a topology, and no list names it."""
    online = [number for number in range(len(cpus)) if number not in offline]
    files = {f"{CPU}/online": ",".join(map(str, online))}

    def listed(key: Callable[[Cpu], object], value: object) -> str:
        return ",".join(str(number) for number in online if key(cpus[number]) == value)

    for number, cpu in enumerate(cpus):
        folder = f"{CPU}/cpu{number}"
        files[f"{folder}/online"] = str(int(number in online))
        if number in offline:
            continue
        own, package = cpu[:3], cpu.socket
        files |= {
            f"{folder}/topology/physical_package_id": str(package),
            f"{folder}/topology/core_id": str(cpu.core),
            f"{folder}/topology/package_cpus_list": listed(lambda other: other.socket, package),
            f"{folder}/topology/thread_siblings_list": listed(lambda other: other[:3], own),
        }
        if cpu.l3 is not None:
            files |= {
                f"{folder}/cache/index3/level": "3",
                f"{folder}/cache/index3/shared_cpu_list": listed(lambda other: other.l3, cpu.l3),
            }
    for node in {cpu.node for cpu in cpus}:
        files[f"{NODE}/node{node}/cpulist"] = listed(lambda other: other.node, node)
        files |= memory(node, 2**20)
    return files


def clusters(threads: int = 1, cores: int = 2) -> list[Cpu]:
    """Two sockets of four sub-NUMA clusters (Intel's SNC 4): each cluster is a memory node of `cores`
    cores, and the L3 cache is the whole socket's. Second hardware threads are numbered last."""
    each = [Cpu(core // (4 * cores), core // cores, core % (4 * cores), core // (4 * cores))
            for core in range(8 * cores)]  # fmt: skip
    return each * threads


def distances(rows: Sequence[Sequence[int]]) -> dict[str, str]:
    """The table of distances between nodes 0, 1, ..."""
    return {f"{NODE}/node{node}/distance": " ".join(map(str, row)) for node, row in enumerate(rows)}


def sockets_on_nodes(places: list[tuple[int, int]], numa_fake: int = 1) -> dict[str, str]:
    """A core of one cpu for each (socket, node); each node tells 1 GiB and, with `numa_fake`, is told
    as so many nodes, all of which list its cpus."""
    files = {f"{CPU}/online": f"0-{len(places) - 1}"}
    for cpu, (socket, _) in enumerate(places):
        folder = f"{CPU}/cpu{cpu}/topology"
        package = [str(other) for other, place in enumerate(places) if place[0] == socket]
        files[f"{folder}/physical_package_id"] = str(socket)
        files[f"{folder}/core_id"] = str(cpu)
        files[f"{folder}/package_cpus_list"] = ",".join(package)
        files[f"{folder}/thread_siblings_list"] = str(cpu)
    for node in {place[1] for place in places}:
        cpus = ",".join(str(cpu) for cpu, place in enumerate(places) if place[1] == node)
        for part in range(node * numa_fake, (node + 1) * numa_fake):
            files[f"{NODE}/node{part}/cpulist"] = cpus
            files |= memory(part, 2**20 // numa_fake)
    return files


def memory(node: int, kib: int) -> dict[str, str]:
    return {f"{NODE}/node{node}/meminfo": f"Node {node} MemTotal:  {kib} kB"}


def memory_only(node: int, distance: str = "", bandwidth: int = 0) -> dict[str, str]:
    """A node without cpus."""
    files = {f"{NODE}/node{node}/cpulist": "", **memory(node, 4096)}
    if distance:
        files[f"{NODE}/node{node}/distance"] = distance
    if bandwidth:
        files[f"{NODE}/node{node}/access0/initiators/read_bandwidth"] = str(bandwidth)
    return files


def gpus(num: int = 3) -> dict[str, str]:
    """NVIDIA devices on the second socket's nodes, beside a network card and an audio function."""
    files = {
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x15b3",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x020000",
        "sys/bus/pci/devices/0000:3b:00.1/vendor": "0x10de",
        "sys/bus/pci/devices/0000:3b:00.1/class": "0x040300",
    }
    names = ("0000:3b:00.0", "0000:5e:00.0", "10000:01:00.0")
    for index, name in enumerate(names[:num]):
        device = f"sys/bus/pci/devices/{name}"
        files |= {
            f"{device}/vendor": "0x10de",
            f"{device}/class": "0x030200",
            f"{device}/numa_node": str(index + 1 if index else -1),
            f"{device}/local_cpulist": "4-7,12-15",
            f"proc/driver/nvidia/gpus/{name}/information": (
                f"Model: \t\t NVIDIA A100\nGPU UUID: \t {GPU_UUIDS[index]}\nDevice Minor: \t {index}"
            ),
        }
    return files


def with_mask(cpus: str, mems: str) -> dict[str, str]:
    status = f"Name:\tpython\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{mems}\nThreads:\t1"
    return {"proc/self/status": status}


def planned(topology: Topology, **request: Any) -> LaunchPlan:
    """A plan of ranks that are bound, unless the request says otherwise."""
    return plan_launch(topology, LaunchRequest(**{"bind_cores": True, **request}))
