"""Memory that is not one node per socket: sockets that share a node, nodes that share cpus."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from base.errors import LaunchError
from launcher.draw import render_plain
from launcher.fit import check_fit
from launcher.machine.topology import read_topology
from launcher.plan import MAX_RANKS, LaunchPlan
from tests.launcher.trees import NODE, planned, sockets_on_nodes, two_sockets, write
from tests.running import CHECKOUT, RunYoke


def cpus(plan: LaunchPlan) -> list[tuple[int, ...]]:
    return [rank.cpus for rank in plan.ranks]


@pytest.mark.parametrize(
    ("places", "expected", "sharing"),
    [
        pytest.param([(i, 0) for i in range(8)], [tuple(range(8))], ["sockets 0-7"], id="vm"),
        pytest.param(
            [(i, i // 4) for i in range(8)], [(0, 1, 2, 3), (4, 5, 6, 7)],
            ["sockets 0-3", "sockets 4-7"], id="several to a node",
        ),
        pytest.param(
            [(i, i % 2) for i in range(4)], [(0, 2), (1, 3)], ["sockets 0,2", "sockets 1,3"],
            id="in turn",
        ),
        pytest.param([(0, 0), (0, 1), (1, 1), (1, 2)], [(0, 1, 2, 3)], ["sockets 0-1"], id="chain"),
        pytest.param([(0, 0), (1, 1), (2, 1)], [(0,), (1, 2)], ["sockets 1-2"], id="one of its own"),
        pytest.param([(0, 0), (0, 1), (1, 2), (1, 3)], [(0, 1), (2, 3)], [], id="nodes of their own"),
    ],
)  # fmt: skip
def test_sockets_that_share_a_memory_node_are_one_unit(
    places: list[tuple[int, int]], expected: list[tuple[int, ...]], sharing: list[str], tmp_path: Path
) -> None:
    topology = read_topology(write(tmp_path, sockets_on_nodes(places)))
    made = planned(topology)
    assert cpus(made) == expected
    said = [reason for reason in made.reasons if "share memory node" in reason]
    assert [reason.split(" share")[0] for reason in said] == sharing
    sockets = len({socket for socket, _ in places})
    each = [tuple(i for i, place in enumerate(places) if place[0] == s) for s in range(sockets)]
    assert cpus(planned(topology, rank_per="socket")) == each
    assert len(planned(topology, ranks=2).ranks) == 2
    assert len(planned(topology, ranks=len(places)).ranks) == len(places)


def test_parts_of_a_unit_end_where_its_sockets_end(tmp_path: Path) -> None:
    sizes = [(0, 0)] * 2 + [(1, 0)] * 4
    topology = read_topology(write(tmp_path, sockets_on_nodes(sizes)))
    assert cpus(planned(topology, ranks=2)) == [(0, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("sockets", [1, 2])
def test_nodes_that_list_the_same_cpus_are_one_place(
    sockets: int, tmp_path: Path, run_yoke: RunYoke
) -> None:
    places = [(socket, socket) for socket in range(sockets) for _ in range(4)]
    root = write(tmp_path, sockets_on_nodes(places, numa_fake=4))
    topology = read_topology(root)
    assert {node.kind for node in topology.nodes} == {"dram"}
    assert [node.socket for node in topology.nodes] == [i // 4 for i in range(4 * sockets)]
    assert [socket.nodes for socket in topology.sockets] == [(0, 1, 2, 3), (4, 5, 6, 7)][:sockets]
    for wishes in ({}, {"rank_per": "node"}, {"numa_memory": "interleave"}):
        made = planned(topology, **wishes)
        assert [rank.nodes for rank in made.ranks] == [(0, 1, 2, 3), (4, 5, 6, 7)][:sockets]
        assert not any("spans" in reason for reason in made.reasons)
    assert any("list the same cpus 0-3" in reason for reason in made.reasons)
    half = planned(topology, ranks=2 * sockets)
    assert half.ranks[1].nodes == (0, 1, 2, 3)
    fits = check_fit(topology, planned(topology), [{"weights": 2**30}] * sockets)
    assert [fit.available_bytes for fit in fits] == [2**30] * sockets
    text = render_plain(topology, planned(topology))
    assert re.search(r"socket 0\n +nodes 0-3 +1\.0 GiB +dram +4 cores, cpus 0-3\n", text)
    assert "memory bind 0-3" in text and "memory-only" not in text

    result = run_yoke("plan", "--bind-cores-to-rank", "--json", "--sysfs", str(root))
    assert json.loads(result.stdout)["ranks"][0]["nodes"] == [0, 1, 2, 3]


def test_of_nodes_that_share_cpus_only_the_allowed_are_used(tmp_path: Path) -> None:
    status = {"proc/self/status": "Cpus_allowed_list:\t0-3\nMems_allowed_list:\t1-2"}
    topology = read_topology(write(tmp_path, sockets_on_nodes([(0, 0)] * 4, numa_fake=4) | status))
    made = planned(topology)
    assert [rank.nodes for rank in made.ranks] == [(1, 2)]
    assert "not allowed" not in render_plain(topology, made)


def test_a_node_without_a_cpu_of_its_own_is_memory_of_all_that_it_lists(tmp_path: Path) -> None:
    files = two_sockets() | {f"{NODE}/node3/cpulist": "0-15"}  # nodes 0 to 2 list 12 of them
    made = planned(read_topology(write(tmp_path / "a", files)), rank_per="node")
    assert [rank.nodes for rank in made.ranks] == [(0,), (1,), (2,), (3,)]
    files = two_sockets() | {f"{NODE}/node1/cpulist": "0-1", f"{NODE}/node0/cpulist": "0-3,8-11"}
    topology = read_topology(write(tmp_path / "b", files))
    assert [rank.nodes for rank in planned(topology).ranks] == [(0, 1), (2, 3)]
    assert any("memory nodes 0-1 list the same cpus 0-1" in note for note in topology.notes)


def test_gpus_and_memory_beside_any_of_the_nodes_that_share_cpus(tmp_path: Path) -> None:
    gpu = "sys/bus/pci/devices/0000:01:00.0"
    files = sockets_on_nodes([(0, 0)] * 2 + [(1, 1)] * 2, numa_fake=2) | {
        f"{gpu}/vendor": "0x10de", f"{gpu}/class": "0x030200", f"{gpu}/numa_node": "3",
        f"{NODE}/node4/cpulist": "", f"{NODE}/node4/meminfo": "Node 4 MemTotal:  1024 kB",
        f"{NODE}/node4/access0/initiators/node3/x": "",
        f"{NODE}/node4/access0/initiators/read_bandwidth": "400",
        f"{NODE}/node3/access0/initiators/read_bandwidth": "100",
    }  # fmt: skip
    topology = read_topology(write(tmp_path, files))
    (rank,) = planned(topology, rank_per="gpu").ranks
    assert rank.cpus == (2, 3)
    assert [(rank.nodes, rank.preferred_nodes) for rank in planned(topology).ranks] == [
        ((0, 1), ()),
        ((2, 3, 4), (4,)),
    ]


def test_many_sockets_are_planned_up_to_what_a_group_holds(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, sockets_on_nodes([(i, i) for i in range(72)])))
    assert len(planned(topology).ranks) == len(planned(topology, ranks=72).ranks) == 72
    assert [len(rank.cpus) for rank in planned(topology, ranks=8).ranks] == [9] * 8
    with pytest.raises(LaunchError, match="--ranks 73: must be 1 to 72 here"):
        planned(topology, ranks=73)


def test_the_most_ranks_are_those_of_a_group() -> None:
    header = (CHECKOUT / "comm" / "csrc" / "channel.h").read_text()
    assert f"constexpr int kMaxWorld = {MAX_RANKS};" in header
