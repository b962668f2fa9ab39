"""Recorded machines against what hwloc says of them, and small trees that are odd or broken."""

from __future__ import annotations

import os
import re
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.errors import LaunchError
from launcher.machine.sysfs import parse_cpu_mask
from launcher.machine.topology import Core, Topology, format_cpu_list, parse_cpu_list, read_topology
from tests.launcher.lstopo import read_listing
from tests.launcher.trees import CPU, NODE, memory, memory_only, two_sockets, with_mask, write

RECORDED = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "topologies"


NAMES = sorted(path.name.removesuffix(".tar.bz2") for path in RECORDED.glob("*.tar.bz2"))


def unpacked(name: str, folder: Path) -> Path:
    """The recorded tree, without the folders of single memory blocks that some have by thousands."""
    with tarfile.open(RECORDED / f"{name}.tar.bz2") as archive:
        wanted = (m for m in archive if not re.search(r"/node\d+/memory\d|/hugepages", m.name))
        archive.extractall(folder, wanted, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.mark.skipif(not NAMES, reason="no recorded machines in ../shared/topologies")
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_recorded_machines(name: str, tmp_path: Path) -> None:
    (path,) = (p for suffix in ("console", "xml") if (p := RECORDED / f"{name}.{suffix}").exists())
    listing = read_listing(path)
    topology = read_topology(unpacked(name, tmp_path))
    assert {socket.id for socket in topology.sockets} == listing.packages
    assert set(topology.allowed_cpus) == listing.allowed
    assert {frozenset(core.cpus) for core in topology.cores} == listing.cores
    assert {cpu: core.socket for core in topology.cores for cpu in core.cpus} == listing.package_of
    sharing: dict[int, set[int]] = {}
    for core in topology.cores:
        if core.l3 is not None:
            sharing.setdefault(core.l3, set()).update(core.cpus)
    assert {frozenset(cpus) for cpus in sharing.values()} == listing.l3
    assert {node.id for node in topology.nodes} == set(topology.allowed_nodes) == set(listing.nodes)
    by_id = {node.id: node for node in topology.nodes}
    for number, (cpus, package) in listing.nodes.items():
        node = by_id[number]
        assert node.socket == package
        if node.near is None:
            assert set(node.cpus) == cpus
        else:  # the listing draws memory without cpus beside the cpus it is nearest to
            assert node.cpus == () and set(by_id[node.near].cpus) == cpus
        subtype = listing.node_kinds[number]
        assert node.kind == (subtype.lower() or "dram")
    kinds = {0: "efficiency", 1: "performance"}
    assert {cpu: core.kind for core in topology.cores for cpu in core.cpus if core.kind} == {
        cpu: kinds[efficiency] for cpu, efficiency in listing.efficiency.items()
    }


@pytest.mark.skipif(not NAMES, reason="no recorded machines in ../shared/topologies")
def test_what_a_recorded_machine_leaves_out_is_said(tmp_path: Path) -> None:
    topology = read_topology(unpacked("40intel64-4n10c+pci-conflicts", tmp_path / "a"))
    assert "package 3 claims cpus 0-2" in topology.notes[0]
    assert "L3" in topology.notes[1] and len(topology.notes) == 2
    topology = read_topology(unpacked("16amd64-8n2c-cpusets", tmp_path / "b"))
    assert topology.cores[0] == Core(0, 0, 0, (0,))  # on a node whose memory is not allowed
    assert {socket.id: socket.nodes for socket in topology.sockets}[0] == ()
    assert {socket.id: socket.nodes for socket in topology.sockets}[4] == (4,)


@pytest.fixture
def machine(tmp_path: Path) -> Topology:
    return read_topology(write(tmp_path, two_sockets()))


def test_sockets_nodes_and_hardware_threads(machine: Topology) -> None:
    assert [(socket.id, socket.nodes) for socket in machine.sockets] == [(0, (0, 1)), (1, (2, 3))]
    assert [core.cpus for core in machine.cores] == [(i, i + 8) for i in range(8)]
    assert [core.l3 for core in machine.cores] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert [node.memory_bytes for node in machine.nodes] == [2**20 * (n + 1) for n in range(4)]
    assert machine.notes == ()


def test_only_what_the_mask_and_the_cpuset_allow(tmp_path: Path) -> None:
    files = two_sockets() | with_mask("2-5,10-31", "0-2")
    topology = read_topology(write(tmp_path / "a", files))
    assert [core.cpus for core in topology.cores] == [(2, 10), (3, 11), (4, 12), (5, 13), (14,), (15,)]
    assert topology.allowed_nodes == (0, 1, 2)
    assert topology.nodes[0].cpus == () and topology.nodes[0].near is None  # it has cpus, of others
    assert [socket.nodes for socket in topology.sockets] == [(0, 1), (2,)]
    files |= {
        "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0",
        "proc/self/cgroup": "0::/job",
        "sys/fs/cgroup/job/cpuset.cpus.effective": "0-4",
        "sys/fs/cgroup/job/cpuset.mems.effective": "1,3",
    }
    topology = read_topology(write(tmp_path / "b", files))
    assert topology.allowed_cpus == (2, 3, 4) and topology.allowed_nodes == (1,)
    files |= {
        "sys/fs/cgroup/job/cpuset.cpus.effective": "64-71",
        "sys/fs/cgroup/job/cpuset.mems.effective": "9",
    }
    topology = read_topology(write(tmp_path / "c", files))
    assert len(topology.allowed_cpus) == 10 and topology.allowed_nodes == (0, 1, 2)
    assert "cpus 64-71, but none of them can be used" in topology.notes[0]
    assert "memory nodes 9" in topology.notes[1]


def test_a_mask_without_a_usable_cpu_or_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"mask has cpus 64-71, and the online cpus are 0-15"):
        read_topology(write(tmp_path / "a", two_sockets() | with_mask("64-71", "0-3")))
    with pytest.raises(LaunchError, match=r"nodes 0-3 exist and 9 are allowed"):
        read_topology(write(tmp_path / "b", two_sockets() | with_mask("0-15", "9")))


def test_masks_are_read_where_there_are_no_lists(tmp_path: Path) -> None:
    files = {}
    for name, text in two_sockets().items():
        if name.endswith("/online"):
            files[name] = text
            continue
        if name.endswith(("cpulist", "_cpu_list", "_siblings_list", "_cpus_list")):
            mask = sum(1 << cpu for cpu in parse_cpu_list(text))
            name = re.sub("cpulist$", "cpumap", name).replace("_cpu_list", "_cpu_map")
            name, text = (
                name.replace("cpus_list", "cpus").replace("siblings_list", "siblings"),
                f"{mask:x}",
            )
        files[name] = text + "\0\0"  # as some recordings have it
    masked = read_topology(write(tmp_path / "masks", files))
    assert masked == read_topology(write(tmp_path / "lists", two_sockets()))


def test_memory_without_cpus_is_near_a_node_with_cpus(tmp_path: Path) -> None:
    files = two_sockets() | memory_only(9)
    last = read_topology(write(tmp_path / "a", files)).nodes[-1]
    # Nothing says where it is: the first node stands for all, and no socket.
    assert (last.id, last.kind, last.cpus, last.socket, last.near) == (9, "memory-only", (), None, 0)
    files |= memory_only(9, distance="31 31 21 21 10")
    last = read_topology(write(tmp_path / "b", files)).nodes[-1]
    assert (last.socket, last.near) == (1, 2)  # two nodes are equally near, of one socket
    files[f"{NODE}/node9/access1/initiators/node3/id"] = ""
    topology = read_topology(write(tmp_path / "c", files))
    assert (topology.nodes[-1].socket, topology.nodes[-1].near) == (1, 3)
    assert [socket.nodes for socket in topology.sockets] == [(0, 1), (2, 3, 9)]


@pytest.mark.parametrize(
    ("bandwidth", "kind"), [(400, "hbm"), (120, "memory-only"), (30, "cxl"), (0, "memory-only")]
)
def test_kind_of_memory_by_its_bandwidth(bandwidth: int, kind: str, tmp_path: Path) -> None:
    files = two_sockets() | memory_only(9, "31 31 21 31 10", bandwidth)
    files[f"{NODE}/node2/access0/initiators/read_bandwidth"] = "100"
    assert read_topology(write(tmp_path, files)).nodes[-1].kind == kind


@pytest.mark.parametrize(
    ("device", "bandwidth", "kind"),
    [
        ("platform/hmem.1/dax0.0", 0, "hbm"),
        ("platform/hmem.1/dax0.0", 30, "cxl"),  # CXL memory that the firmware sets aside
        ("LNXSYSTM:00/ACPI0012:00/ndbus0/region6/dax6.1/dax0.0", 0, "nvm"),
        ("platform/ACPI0017:00/root0/decoder0.0/region0/dax_region0/dax0.0", 0, "cxl"),
        ("platform/other/dax0.0", 0, "memory-only"),
    ],
)
def test_kind_of_memory_by_its_device(device: str, bandwidth: int, kind: str, tmp_path: Path) -> None:
    files = two_sockets() | memory_only(9, "31 31 21 31 10", bandwidth)
    files[f"{NODE}/node2/access0/initiators/read_bandwidth"] = "100"
    files[f"sys/devices/{device}/target_node"] = "9"
    write(tmp_path, files)
    (tmp_path / "sys/bus/dax/devices").mkdir(parents=True)
    (tmp_path / "sys/bus/dax/devices/dax0.0").symlink_to(f"../../../devices/{device}")
    assert read_topology(tmp_path).nodes[-1].kind == kind


def test_cpus_without_memory(tmp_path: Path) -> None:
    files = two_sockets() | with_mask("0-15", "0,2-3") | memory(1, 0)
    topology = read_topology(write(tmp_path, files))
    assert [node.kind for node in topology.nodes] == ["dram", "no-memory", "dram", "dram"]
    assert topology.allowed_nodes == (0, 2, 3)


def test_memory_of_a_machine_with_one_node(tmp_path: Path) -> None:
    files = {f"{CPU}/online": "0-1", f"{NODE}/node0/cpulist": "0-1", **memory(0, 2048)}
    topology = read_topology(write(tmp_path / "a", files | {"proc/meminfo": "MemTotal:  4096 kB"}))
    assert topology.nodes[0].memory_bytes == 4 << 20
    assert "/proc/meminfo 4 MiB" in topology.notes[-1]
    topology = read_topology(write(tmp_path / "b", files | {"proc/meminfo": "MemTotal:  2100 kB"}))
    assert topology.nodes[0].memory_bytes == 2 << 20
    several = two_sockets() | {"proc/meminfo": "MemTotal: 99999 kB"}
    assert read_topology(write(tmp_path / "c", several)).nodes[0].memory_bytes == 1 << 20


def test_hybrid_cores(tmp_path: Path) -> None:
    fast, slow = ["performance"] * 6, ["efficiency"] * 2
    intel = {"sys/devices/cpu_core/cpus": "0-5", "sys/devices/cpu_atom/cpus": "6-7"}
    arm = {f"{CPU}/cpu{cpu}/cpu_capacity": "1024" if cpu < 6 else "530" for cpu in range(8)}
    same = {f"{CPU}/cpu{cpu}/cpu_capacity": f"{1024 - cpu}" for cpu in range(8)}
    # The server of this kind gives some of its equal cores a higher clock.
    clock = {f"{CPU}/cpu{cpu}/cpufreq/base_frequency": str(2700 - cpu // 6) for cpu in range(8)}
    for name, more, kinds in (
        ("intel", intel, fast + slow),
        ("arm", arm, fast + slow),
        ("same", same, [""] * 8),
        ("clock", clock, [""] * 8),
    ):
        topology = read_topology(write(tmp_path / name, two_sockets(threads=1) | more))
        assert [core.kind for core in topology.cores] == kinds


def test_offline_and_undescribed_cpus_are_left_out(tmp_path: Path) -> None:
    files = two_sockets() | {f"{CPU}/online": "0-2,4-15,99"}
    topology = read_topology(write(tmp_path / "a", files))
    assert 3 not in topology.allowed_cpus and 99 not in topology.allowed_cpus
    assert [core.cpus for core in topology.cores][:4] == [(0, 8), (1, 9), (2, 10), (11,)]
    assert topology.notes == ("cpus 99 are online but not described: they are not used",)
    del files[f"{CPU}/online"]  # old kernels tell it cpu by cpu
    files[f"{CPU}/cpu3/online"] = "0"
    assert read_topology(write(tmp_path / "b", files)).allowed_cpus == (0, 1, 2, *range(4, 16))


def test_a_package_number_used_twice_is_two_packages(tmp_path: Path) -> None:
    files = two_sockets() | {f"{CPU}/cpu{cpu}/topology/physical_package_id": "0" for cpu in range(16)}
    topology = read_topology(write(tmp_path, files))
    assert [(socket.id, socket.nodes) for socket in topology.sockets] == [(0, (0, 1)), (1, (2, 3))]
    assert "cpus 4-7,12-15 are numbered 1" in topology.notes[0]


def test_each_cpu_a_package_below_one_l3(tmp_path: Path) -> None:
    """As virtual machines are configured."""
    files = {f"{CPU}/online": "0-3", f"{NODE}/node0/cpulist": "0-3", **memory(0, 4096)}
    for cpu in range(4):
        files[f"{CPU}/cpu{cpu}/topology/physical_package_id"] = str(cpu)
        files[f"{CPU}/cpu{cpu}/topology/core_siblings_list"] = str(cpu)
        files[f"{CPU}/cpu{cpu}/topology/thread_siblings_list"] = str(cpu)
        files[f"{CPU}/cpu{cpu}/cache/index3/level"] = "3"
        files[f"{CPU}/cpu{cpu}/cache/index3/shared_cpu_list"] = "0-3"
    topology = read_topology(write(tmp_path, files))
    assert [(socket.id, socket.nodes) for socket in topology.sockets] == [(i, (0,)) for i in range(4)]
    assert topology.nodes[0].socket is None
    assert {core.l3 for core in topology.cores} == {0}
    assert topology.notes == ()


def test_a_cpu_that_two_nodes_claim(tmp_path: Path) -> None:
    files = two_sockets() | {f"{NODE}/node1/cpulist": "1-3,9-11"}
    topology = read_topology(write(tmp_path, files))
    assert [node.cpus for node in topology.nodes][:2] == [(0, 1, 8, 9), (2, 3, 10, 11)]
    assert "nodes 0 and 1 both claim cpus 1,9" in topology.notes[0]


def test_cpu_lists_and_masks() -> None:
    assert parse_cpu_list(" 0-3,8\n") == (0, 1, 2, 3, 8)
    assert parse_cpu_list("") == ()
    assert format_cpu_list((8, 0, 1, 2, 3)) == "0-3,8"
    assert format_cpu_list(()) == ""
    assert parse_cpu_mask("1,00000000,00000005\n") == (0, 2, 64)
    for text in ("", "0x3", "1,,2", "123456789", "f," * 3000 + "f"):
        with pytest.raises(LaunchError, match=r"is (not )?a mask "):
            parse_cpu_mask(text)


@given(st.sets(st.integers(0, 65535), max_size=50))
def test_cpu_lists_survive_a_round_trip(numbers: set[int]) -> None:
    assert parse_cpu_list(format_cpu_list(numbers)) == tuple(sorted(numbers))
    mask = sum(1 << number for number in numbers)
    words = [f"{mask >> 32 * i & 0xFFFFFFFF:08x}" for i in range(2048)]
    assert parse_cpu_mask(",".join(reversed(words))) == tuple(sorted(numbers))


def test_a_large_machine_is_read_quickly(tmp_path: Path) -> None:
    root = write(tmp_path, two_sockets(threads=2, cores=100))
    seconds = []
    for _ in range(3):
        start = time.process_time()  # others may have the processor meanwhile
        topology = read_topology(root)
        seconds.append(time.process_time() - start)
    assert len(topology.cores) == 100
    assert min(seconds) < 0.15


def test_this_machine_can_be_read() -> None:
    topology = read_topology()
    assert set(topology.allowed_cpus) <= os.sched_getaffinity(0)
    assert topology.cores and topology.nodes
