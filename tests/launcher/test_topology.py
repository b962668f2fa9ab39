"""Recorded machines against what hwloc says of them, and small trees that are odd or broken."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from launcher.errors import LaunchError
from launcher.topology import Topology, format_cpu_list, parse_cpu_list, read_topology

RECORDED = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "topologies"
# Trees whose listing shows packages, nodes and logical cpus as the system numbers them.
NAMES = sorted(path.name.removesuffix(".console") for path in RECORDED.glob("*.console"))
NOT_YET = {
    "16amd64-8n2c-cpusets": "cgroup files of a recorded tree are not read yet",
    "40intel64-4n10c+pci-conflicts": "the tree contradicts itself, and hwloc drops a socket",
}


def listed(name: str) -> tuple[list[int], list[int], list[int]]:
    """Packages, nodes and logical cpus of an lstopo listing, by the system's index."""
    text = (RECORDED / f"{name}.console").read_text()
    packages = [int(n) for n in re.findall(r"Package L#\d+ \(P#(\d+)", text)]
    nodes = [int(n) for n in re.findall(r"NUMANode L#\d+ \((?:P#)?(\d+)", text)]
    cpus = [int(n) for n in re.findall(r"PU L#\d+ \(P#(\d+)", text)]
    return packages, nodes, cpus


@pytest.mark.skipif(not NAMES, reason="no recorded machines in ../shared/topologies")
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_recorded_machines(name: str, tmp_path: Path) -> None:
    with tarfile.open(RECORDED / f"{name}.tar.bz2") as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    if name in NOT_YET:
        pytest.skip(NOT_YET[name])
    packages, nodes, cpus = listed(name)
    options = (RECORDED / f"{name}.test").read_text() if cpus else ""
    if not cpus or "disallowed" in options or "no-smt" in options:
        pytest.skip(f"the listing of {name} was made with options that change what it shows")
    topology = read_topology(root)
    seen = {cpu for core in topology.cores for cpu in core.cpus}
    assert seen == set(cpus)
    if packages and len(set(packages)) == len(packages):
        assert {socket.id for socket in topology.sockets} == set(packages)
    if nodes and len(set(nodes)) == len(nodes):
        assert {node.id for node in topology.nodes} >= set(nodes)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "sys/devices/system" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def two_sockets(threads: int = 2) -> dict[str, str]:
    """Two sockets of two nodes of two cores; the second hardware threads are numbered last."""
    files = {"cpu/online": f"0-{8 * threads - 1}"}
    for cpu in range(8 * threads):
        core = cpu % 8
        files[f"cpu/cpu{cpu}/topology/physical_package_id"] = str(core // 4)
        siblings = ",".join(str(core + 8 * i) for i in range(threads))
        files[f"cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
    for node in range(4):
        members = [cpu for cpu in range(8 * threads) if cpu % 8 // 2 == node]
        files[f"node/node{node}/cpulist"] = ",".join(map(str, members))
        files[f"node/node{node}/meminfo"] = f"Node {node} MemTotal:  {1024 * (node + 1)} kB"
    return files


@pytest.fixture
def machine(tmp_path: Path) -> Topology:
    return read_topology(tree(tmp_path, two_sockets()))


def test_sockets_nodes_and_hardware_threads(machine: Topology) -> None:
    assert [(socket.id, socket.nodes) for socket in machine.sockets] == [(0, (0, 1)), (1, (2, 3))]
    assert [core.cpus for core in machine.cores] == [(i, i + 8) for i in range(8)]
    assert [node.memory_bytes for node in machine.nodes] == [2**20 * (n + 1) for n in range(4)]
    assert machine.notes == ()


def test_memory_without_cpus_is_a_node_of_its_own_kind(tmp_path: Path) -> None:
    files = two_sockets()
    files |= {"node/node9/cpulist": "", "node/node9/meminfo": "Node 9 MemTotal: 4096 kB"}
    topology = read_topology(tree(tmp_path, files))
    last = topology.nodes[-1]
    assert (last.id, last.kind, last.cpus, last.socket) == (9, "memory-only", (), None)


def test_what_is_missing_is_replaced_and_said(tmp_path: Path) -> None:
    files = {name: text for name, text in two_sockets().items() if not name.startswith("node")}
    topology = read_topology(tree(tmp_path / "a", files))
    assert [node.id for node in topology.nodes] == [0]
    assert "is missing" in topology.notes[0]
    files = {name: text for name, text in two_sockets().items() if "package" not in name}
    topology = read_topology(tree(tmp_path / "b", files))
    assert [socket.id for socket in topology.sockets] == [0, 1, 2, 3]  # by node
    assert "name no socket" in topology.notes[0]


def test_nonsense_is_refused(tmp_path: Path) -> None:
    for text in ("0-", "7-3", "a,b", "0-99999999999"):
        with pytest.raises(LaunchError):
            read_topology(tree(tmp_path, {"cpu/online": text}))
    with pytest.raises(LaunchError, match="lists no cpus"):
        read_topology(tmp_path / "empty")


def test_cpu_lists() -> None:
    assert parse_cpu_list(" 0-3,8\n") == (0, 1, 2, 3, 8)
    assert parse_cpu_list("") == ()
    assert format_cpu_list((8, 0, 1, 2, 3)) == "0-3,8"
    assert format_cpu_list(()) == ""


def test_this_machine_can_be_read() -> None:
    import os

    topology = read_topology()
    assert set(topology.allowed_cpus) <= os.sched_getaffinity(0)
    assert topology.cores
