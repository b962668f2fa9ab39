"""Plans are pure: machines made of values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import LaunchError
from launcher.plan import LaunchRequest, make_plan, plan_to_json, render_plan
from launcher.topology import Core, Node, Socket, Topology


def machine(sockets: int, nodes: int, cores: int, smt: int = 1) -> Topology:
    """`sockets` of `nodes` of `cores`; cpu numbers as Linux gives them, hardware threads last."""
    total = sockets * nodes * cores
    parts = [
        Core(i, i // (nodes * cores), i // cores, tuple(i + total * t for t in range(smt)))
        for i in range(total)
    ]
    return Topology(
        tuple(Socket(s, tuple(range(s * nodes, (s + 1) * nodes))) for s in range(sockets)),
        tuple(
            Node(n, n // nodes, tuple(c for p in parts if p.node == n for c in p.cpus), 2**34, "dram")
            for n in range(sockets * nodes)
        ),
        tuple(parts),
        (),
        tuple(range(total * smt)),
        tuple(range(sockets * nodes)),
    )


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 2), st.integers(1, 64))
def test_every_core_is_used_once(sockets: int, nodes: int, cores: int, smt: int, ranks: int) -> None:
    topology = machine(sockets, nodes, cores, smt)
    plan = make_plan(topology, LaunchRequest(ranks=ranks, bind_cores=True))
    assert [rank.rank for rank in plan.ranks] == list(range(ranks))
    used = [cpu for rank in plan.ranks for cpu in rank.cpus]
    firsts = [core.cpus[0] for core in topology.cores]
    if ranks <= len(firsts):
        assert sorted(used) == firsts
    else:
        assert set(used) == set(firsts)
        assert any("share" in reason for reason in plan.reasons)
    for rank in plan.ranks:
        assert rank.num_threads == len(rank.cpus) >= 1
        assert set(rank.nodes) == {c.node for c in topology.cores if c.cpus[0] in rank.cpus}
    sizes = [rank.num_threads for rank in plan.ranks]
    if ranks <= len(firsts) and (sockets * nodes) % ranks == 0:
        assert len(set(sizes)) == 1
    assert make_plan(topology, LaunchRequest(ranks=ranks, bind_cores=True)) == plan


def test_one_rank_per_socket_even_with_several_nodes_each() -> None:
    for request in (LaunchRequest(bind_cores=True), LaunchRequest(ranks=2, bind_cores=True)):
        plan = make_plan(machine(2, 4, 3, smt=2), request)
        assert [rank.nodes for rank in plan.ranks] == [(0, 1, 2, 3), (4, 5, 6, 7)]
        assert [rank.memory_policy for rank in plan.ranks] == ["bind", "bind"]
    plan = make_plan(machine(2, 4, 3), LaunchRequest(ranks=4, bind_cores=True))
    assert [rank.nodes for rank in plan.ranks] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_a_remainder_of_cores_is_used_and_said() -> None:
    plan = make_plan(machine(1, 1, 7), LaunchRequest(ranks=3, bind_cores=True))
    assert [rank.num_threads for rank in plan.ranks] == [3, 2, 2]
    assert any("one more" in reason for reason in plan.reasons)


def test_without_the_flag_nothing_is_bound() -> None:
    plan = make_plan(machine(2, 1, 4), LaunchRequest())
    assert [rank.cpus for rank in plan.ranks] == [tuple(range(8))] * 2
    assert [rank.num_threads for rank in plan.ranks] == [4, 4]
    assert {rank.memory_policy for rank in plan.ranks} == {"none"}
    assert any("--bind-cores-to-rank" in reason for reason in plan.reasons)


@pytest.mark.parametrize("ranks", [0, -1, 65])
def test_impossible_numbers_of_ranks_are_refused(ranks: int) -> None:
    with pytest.raises(LaunchError, match=f"--ranks {ranks}"):
        make_plan(machine(1, 1, 1), LaunchRequest(ranks=ranks))


def test_the_plan_for_programs_and_for_people() -> None:
    topology = machine(2, 2, 2)
    plan = make_plan(topology, LaunchRequest(bind_cores=True, comm="gloo"))
    data = json.loads(json.dumps(plan_to_json(topology, plan)))
    assert data.keys() == {"topology", "ranks", "backend", "reasons"}
    assert data["topology"].keys() == {
        "sockets", "nodes", "cores", "gpus", "allowed_cpus", "allowed_nodes",
    }  # fmt: skip
    assert data["ranks"][1] == {
        "rank": 1, "device": "cpu", "nodes": [2, 3], "cpus": [4, 5, 6, 7], "num_threads": 4,
        "memory_policy": "bind",
    }  # fmt: skip
    text = render_plan(topology, plan)
    assert "rank 1  4 threads, bound to cpus 4-7, memory bind 2-3" in text
    assert "16.0 GiB" in text
