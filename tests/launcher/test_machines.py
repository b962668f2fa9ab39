"""Whole machines as Linux describes them, built here: what is read, and where ranks are put.

test_topology reads recorded machines too, where ../shared has them. Each of these is one kind of
machine; what is odd or broken in a description is in test_topology.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.machine.cgroup import read_cgroup
from launcher.machine.topology import read_topology
from launcher.plan import RankPlan
from tests.launcher.trees import (
    CPU,
    NODE,
    Cpu,
    clusters,
    distances,
    machine,
    memory,
    memory_only,
    planned,
    write,
)


def near(rank: RankPlan) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    return rank.nodes, rank.preferred_nodes, rank.memory_policy


# Sub-NUMA clusters, and HBM of its own for each (Xeon Max).


def test_sub_numa_clusters(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, machine(clusters(threads=2))))
    assert topology.notes == ()
    assert [(s.id, s.nodes) for s in topology.sockets] == [(0, (0, 1, 2, 3)), (1, (4, 5, 6, 7))]
    assert [(node.socket, node.cpus) for node in topology.nodes] == [
        (node // 4, (2 * node, 2 * node + 1, 2 * node + 16, 2 * node + 17)) for node in range(8)
    ]
    assert [core.cpus for core in topology.cores] == [(core, core + 16) for core in range(16)]
    assert [core.l3 for core in topology.cores] == [0] * 8 + [8] * 8  # one over all of a socket's nodes
    by_socket = planned(topology)
    assert [rank.cpus for rank in by_socket.ranks] == [tuple(range(8)), tuple(range(8, 16))]
    assert [near(rank) for rank in by_socket.ranks] == [
        ((0, 1, 2, 3), (), "bind"), ((4, 5, 6, 7), (), "bind")
    ]  # fmt: skip
    assert any("--rank-per node" in reason for reason in by_socket.reasons)
    by_node = planned(topology, rank_per="node")
    assert [(rank.cpus, rank.nodes) for rank in by_node.ranks] == [
        ((2 * node, 2 * node + 1), (node,)) for node in range(8)
    ]
    assert len(planned(topology, rank_per="l3").ranks) == 2


def with_hbm() -> dict[str, str]:
    """Each cluster's HBM is a node without cpus, numbered after all others (flat mode)."""
    files = machine(clusters())
    rows = [[10 if a == b else 12 if a // 4 == b // 4 else 21 for b in range(8)] for a in range(8)]
    rows = [[*row, *(13 if a == b else value + 5 for b, value in enumerate(row))]
            for a, row in enumerate(rows)]  # fmt: skip
    rows += [[rows[b][a + 8] for b in range(8)] + [10 if a == b else 24 for b in range(8)]
             for a in range(8)]  # fmt: skip
    for node in range(8):
        files[f"{NODE}/node{node}/access0/initiators/read_bandwidth"] = "77000"
        files |= memory_only(8 + node, bandwidth=205000)
    return files | distances(rows)


def test_hbm_of_each_cluster(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, with_hbm()))
    hbm = topology.nodes[8:]
    assert [(node.kind, node.cpus, node.near, node.socket) for node in hbm] == [
        ("hbm", (), node, node // 4) for node in range(8)
    ]
    assert {node.kind for node in topology.nodes[:8]} == {"dram"}
    assert [socket.nodes for socket in topology.sockets] == [
        (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
    ]  # fmt: skip
    ranks = planned(topology, rank_per="node").ranks
    assert [near(rank) for rank in ranks] == [
        ((node, node + 8), (node + 8,), "preferred") for node in range(8)
    ]


def test_hbm_alone_is_the_nodes_own_memory(tmp_path: Path) -> None:
    """Without DRAM the HBM is on the nodes that have the cpus: nothing is to be preferred."""
    files = machine(clusters())
    files |= {f"{NODE}/node{n}/access0/initiators/read_bandwidth": "205000" for n in range(8)}
    topology = read_topology(write(tmp_path, files))
    assert {node.kind for node in topology.nodes} == {"dram"}
    assert [rank.memory_policy for rank in planned(topology).ranks] == ["bind", "bind"]


# Memory behind CXL.


def two_nodes() -> list[Cpu]:
    return [Cpu(core // 4, core // 4, core % 4, core // 4) for core in range(8)]


@pytest.mark.parametrize(
    ("row", "near_node", "socket"),
    [
        ("14 24 10", 0, 0),  # an expander at the first socket
        ("24 14 10", 1, 1),
        ("24 24 10", 0, None),  # behind a switch: no socket's own
    ],
)
def test_a_cxl_expander_is_left_to_others(
    row: str, near_node: int, socket: int | None, tmp_path: Path
) -> None:
    device = "platform/ACPI0017:00/root0/decoder0.0/region0/dax_region0/dax0.0"
    files = machine(two_nodes()) | memory_only(2, row) | {f"sys/devices/{device}/target_node": "2"}
    write(tmp_path, files)
    (tmp_path / "sys/bus/dax/devices").mkdir(parents=True)
    (tmp_path / "sys/bus/dax/devices/dax0.0").symlink_to(f"../../../devices/{device}")
    topology = read_topology(tmp_path)
    node = topology.nodes[2]
    assert (node.kind, node.cpus, node.near, node.socket) == ("cxl", (), near_node, socket)
    plan = planned(topology)
    assert [near(rank) for rank in plan.ranks] == [((0,), (), "bind"), ((1,), (), "bind")]
    assert any("not used, as they are slower: 2 (cxl)" in reason for reason in plan.reasons)


def test_cores_whose_only_memory_is_behind_cxl_use_it(tmp_path: Path) -> None:
    files = machine(two_nodes()) | memory(1, 0) | memory_only(2, "24 14 10", bandwidth=30)
    files[f"{NODE}/node1/access0/initiators/read_bandwidth"] = "100"
    topology = read_topology(write(tmp_path, files))
    assert [node.kind for node in topology.nodes] == ["dram", "no-memory", "cxl"]
    assert [near(rank) for rank in planned(topology).ranks] == [((0,), (), "bind"), ((2,), (), "bind")]


# Hybrid processors. The 4 performance cores have two threads each, numbered one after the other.

HYBRID = [Cpu(0, 0, core, 0) for core in (0, 0, 1, 1, 2, 2, 3, 3, *range(4, 12))]
PERFORMANCE, EFFICIENCY = [(2 * i, 2 * i + 1) for i in range(4)], [(i,) for i in range(8, 16)]
UNITS = {"sys/devices/cpu_core/cpus": "0-7", "sys/devices/cpu_atom/cpus": "8-15"}
CLOCKS = {
    f"{CPU}/cpu{cpu}/cpufreq/base_frequency": "3400000" if cpu < 8 else "2500000" for cpu in range(16)
}
CAPACITIES = {f"{CPU}/cpu{cpu}/cpu_capacity": "1024" if cpu < 8 else "460" for cpu in range(16)}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(UNITS, id="performance monitoring units"),
        pytest.param(CLOCKS, id="clocks, and threads that agree with them"),
        pytest.param(CAPACITIES, id="capacities"),
        pytest.param(
            UNITS | {"sys/devices/cpu_atom/cpus": "8-13", "sys/devices/cpu_lowpower/cpus": "14-15"},
            id="three kinds",
        ),
    ],
)
def test_hybrid_cores(more: dict[str, str], tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, machine(HYBRID) | more))
    assert [core.cpus for core in topology.cores] == PERFORMANCE + EFFICIENCY
    assert [core.kind for core in topology.cores] == ["performance"] * 4 + ["efficiency"] * 8
    plan = planned(topology)
    assert [rank.cpus for rank in plan.ranks] == [(0, 2, 4, 6, *range(8, 16))]
    assert any("--bind-core-list 0,2,4,6" in reason for reason in plan.reasons)


def test_efficiency_cores_alone_are_not_slower_than_others(tmp_path: Path) -> None:
    """A mask that leaves one kind: the ranks' cores are equal."""
    status = {"proc/self/status": "Cpus_allowed_list:\t8-15\nMems_allowed_list:\t0"}
    topology = read_topology(write(tmp_path, machine(HYBRID) | UNITS | status))
    assert {core.kind for core in topology.cores} == {"efficiency"}
    assert not any("slower" in reason for reason in planned(topology).reasons)


def test_big_cores_of_two_sizes_are_all_big(tmp_path: Path) -> None:
    capacity = [1024, 905, 905, 905, 384, 384, 384, 384]
    files = {f"{CPU}/cpu{cpu}/cpu_capacity": str(size) for cpu, size in enumerate(capacity)}
    files |= machine([Cpu(0, 0, core) for core in range(8)])
    topology = read_topology(write(tmp_path, files))
    assert [core.kind for core in topology.cores] == ["performance"] * 4 + ["efficiency"] * 4


# Cpus that are offline.


def test_hardware_threads_that_are_off(tmp_path: Path) -> None:
    """As after `echo off > /sys/devices/system/cpu/smt/control`."""
    cpus = clusters(threads=2)
    topology = read_topology(write(tmp_path, machine(cpus, offline=range(16, 32))))
    assert [core.cpus for core in topology.cores] == [(core,) for core in range(16)]
    assert topology.notes == ()
    assert [len(rank.cpus) for rank in planned(topology, smt=True).ranks] == [8, 8]


def test_first_threads_that_are_off(tmp_path: Path) -> None:
    """The second thread of such a core is then its first."""
    topology = read_topology(write(tmp_path, machine(clusters(threads=2), offline=(0, 9))))
    assert [core.cpus for core in topology.cores[:2]] == [(1, 17), (16,)]
    assert [core.cpus for core in topology.cores[8:10]] == [(8, 24), (25,)]
    first, second = planned(topology).ranks
    assert first.cpus == (*range(1, 8), 16) and second.cpus == (8, *range(10, 16), 25)


def test_a_cluster_and_a_socket_that_are_off(tmp_path: Path) -> None:
    """Their memory stays, and is nobody's own: it is memory without cpus."""
    offline = (2, 3, *range(8, 16))  # node 1, and nodes 4 to 7
    rows = [[10 if a == b else 12 if a // 4 == b // 4 else 21 for b in range(8)] for a in range(8)]
    topology = read_topology(write(tmp_path, machine(clusters(), offline) | distances(rows)))
    assert topology.allowed_cpus == (0, 1, 4, 5, 6, 7)
    assert [(node.id, node.kind, node.near) for node in topology.nodes if not node.cpus] == [
        (node, "memory-only", 0) for node in (1, 4, 5, 6, 7)
    ]
    assert [socket.id for socket in topology.sockets] == [0]
    (rank,) = planned(topology).ranks
    assert (rank.cpus, rank.nodes) == ((0, 1, 4, 5, 6, 7), (0, 2, 3))


# Control groups: of version 2 as systemd and containers have them, of version 1 as batch systems do.


def test_a_slice_of_clusters(tmp_path: Path) -> None:
    """A job of version 2 on half of a socket, with a quota and a limit of memory above it."""
    slice_, job = "sys/fs/cgroup/batch.slice", "sys/fs/cgroup/batch.slice/job.scope"
    files = machine(clusters(threads=2)) | {
        "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec 0 0",
        "proc/self/cgroup": "0::/batch.slice/job.scope",
        "proc/self/status": "Cpus_allowed_list:\t4-7,20-23\nMems_allowed_list:\t2-3",
        f"{job}/cpuset.cpus.effective": "4-7,20-23",
        f"{job}/cpuset.mems.effective": "2-3",
        f"{job}/cpu.max": "max 100000",
        f"{job}/memory.max": "max",
        f"{job}/memory.current": "1048576",
        f"{slice_}/cpu.max": "300000 100000",
        f"{slice_}/memory.max": "1073741824",
        f"{slice_}/memory.current": "2097152",
    }
    topology = read_topology(write(tmp_path, files))
    assert topology.notes == ()
    assert [core.cpus for core in topology.cores] == [(cpu, cpu + 16) for cpu in range(4, 8)]
    assert [node.id for node in topology.nodes] == [2, 3]
    assert [(socket.id, socket.nodes) for socket in topology.sockets] == [(0, (2, 3))]
    limits = read_cgroup(tmp_path)
    assert (limits.cpu_quota, limits.memory_limit_bytes) == (3.0, 1 << 30)
    assert limits.memory_used_bytes == 2 << 20
    (rank,) = planned(topology).ranks
    assert (rank.cpus, rank.nodes) == ((4, 5, 6, 7), (2, 3))


def test_a_cpuset_of_version_1_with_cores_and_memory_apart(tmp_path: Path) -> None:
    """Its memory is that of node 1 only: the cores of the other nodes may be used, their memory not."""
    folder = "sys/fs/cgroup/cpuset/slurm/job_7"
    files = machine(clusters()) | {
        "proc/mounts": "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0",
        "proc/self/cgroup": "4:memory:/\n3:cpuset:/slurm/job_7",
        f"{folder}/cpuset.cpus": "0-3,8",
        f"{folder}/cpuset.mems": "1",
    }
    topology = read_topology(write(tmp_path, files))
    assert topology.allowed_cpus == (0, 1, 2, 3, 8) and topology.allowed_nodes == (1,)
    assert [(core.node, core.socket) for core in topology.cores] == [(0, 0)] * 2 + [(1, 0)] * 2 + [
        (4, 1)
    ]
    assert [(socket.id, socket.nodes) for socket in topology.sockets] == [(0, (1,)), (1, ())]
    first, second = planned(topology).ranks
    assert (first.cpus, first.nodes, first.memory_policy) == ((0, 1, 2, 3), (1,), "bind")
    assert (second.cpus, second.memory_policy) == ((8,), "none")


# Processors whose caches and threads are not Intel's.


def test_caches_of_core_complexes(tmp_path: Path) -> None:
    """EPYC: a node has several complexes, each with an L3 cache of its own."""
    cpus = [Cpu(core // 8, core // 8, core % 8, core // 4) for core in range(16)] * 2
    topology = read_topology(write(tmp_path, machine(cpus)))
    assert [core.l3 for core in topology.cores] == [core - core % 4 for core in range(16)]
    ranks = planned(topology, rank_per="l3").ranks
    assert [rank.cpus for rank in ranks] == [tuple(range(i, i + 4)) for i in (0, 4, 8, 12)]
    assert [rank.nodes for rank in ranks] == [(0,), (0,), (1,), (1,)]


def test_modules_of_two_cores_are_two_cores(tmp_path: Path) -> None:
    """Bulldozer lists the cores of a module as threads of one core, but numbers them apart."""
    files = machine([Cpu(0, 0, core, 0) for core in range(4)])
    for cpu in range(4):
        module = f"{cpu - cpu % 2}-{cpu - cpu % 2 + 1}"
        files[f"{CPU}/cpu{cpu}/topology/thread_siblings_list"] = module
    topology = read_topology(write(tmp_path, files))
    assert [core.cpus for core in topology.cores] == [(0,), (1,), (2,), (3,)]
    assert topology.notes == ()


def test_a_package_that_claims_others_cpus(tmp_path: Path) -> None:
    """Seen with broken PCI descriptions: the set of one package covers others."""
    files = machine(two_nodes())
    for cpu in range(4, 8):
        files[f"{CPU}/cpu{cpu}/topology/package_cpus_list"] = "2-7"
    topology = read_topology(write(tmp_path, files))
    assert "package 1 claims cpus 2-3 of other packages" in topology.notes[0]
    assert [core.socket for core in topology.cores] == [0] * 4 + [None] * 4
    assert [(socket.id, socket.nodes) for socket in topology.sockets] == [(0, (0,))]
    assert [rank.cpus for rank in planned(topology).ranks] == [(0, 1, 2, 3), (4, 5, 6, 7)]
