"""Plans are pure: machines made of values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.errors import LaunchError
from launcher.draw import plan_to_json, render_plain
from launcher.fit import check_fit, require_fit
from launcher.flags import parse_flags
from launcher.machine.topology import Core, Gpu, Node, Socket, Topology
from launcher.plan import LaunchRequest, plan_launch
from tests.launcher.trees import planned
from tests.running import RunYoke


def machine(
    sockets: int, nodes: int, cores: int, smt: int = 1, l3_size: int = 0, gpus: int = 0
) -> Topology:
    """`sockets` of `nodes` of `cores`; cpu numbers as Linux gives them, hardware threads last. The
    GPUs are spread over the nodes."""
    total = sockets * nodes * cores
    parts = [
        Core(
            i,
            i // (nodes * cores),
            i // cores,
            tuple(i + total * t for t in range(smt)),
            i - i % l3_size if l3_size else None,
        )
        for i in range(total)
    ]
    cpus_of = [tuple(c for p in parts if p.node == n for c in p.cpus) for n in range(sockets * nodes)]
    return Topology(
        tuple(Socket(s, tuple(range(s * nodes, (s + 1) * nodes))) for s in range(sockets)),
        tuple(
            Node(n, n // nodes, cpus_of[n], 2**34, "dram")
            for n in range(sockets * nodes)
        ),
        tuple(parts),
        tuple(
            Gpu(g, f"0000:0{g}:00.0", n := g * sockets * nodes // gpus, cpus_of[n])
            for g in range(gpus)
        ),
        tuple(range(total * smt)),
        tuple(range(sockets * nodes)),
    )  # fmt: skip


def with_hbm(topology: Topology) -> Topology:
    """Each node gets an HBM node of its own, numbered after all others, and a CXL node."""
    count = len(topology.nodes)
    more = [Node(n.id + count, n.socket, (), 2**30, "hbm", n.id) for n in topology.nodes]
    more += [Node(n.id + 2 * count, n.socket, (), 2**36, "cxl", n.id) for n in topology.nodes]
    return replace(topology, nodes=(*topology.nodes, *more), allowed_nodes=tuple(range(3 * count)))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 2), st.integers(1, 64))
def test_every_core_is_used_once(sockets: int, nodes: int, cores: int, smt: int, ranks: int) -> None:
    topology = machine(sockets, nodes, cores, smt)
    made = planned(topology, ranks=ranks)
    assert [rank.rank for rank in made.ranks] == list(range(ranks))
    used = [cpu for rank in made.ranks for cpu in rank.cpus]
    firsts = [core.cpus[0] for core in topology.cores]
    if ranks <= len(firsts):
        assert sorted(used) == firsts
    else:
        assert set(used) == set(firsts)
        assert any("share" in reason for reason in made.reasons)
    for rank in made.ranks:
        assert rank.num_threads == len(rank.cpus) >= 1
        assert set(rank.nodes) == {c.node for c in topology.cores if c.cpus[0] in rank.cpus}
    sizes = [rank.num_threads for rank in made.ranks]
    if ranks <= len(firsts) and (sockets * nodes) % ranks == 0:
        assert len(set(sizes)) == 1
    assert planned(topology, ranks=ranks) == made


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(1, 8))
def test_reserved_cores_are_nobodys_and_spread(
    sockets: int, nodes: int, cores: int, reserve: int
) -> None:
    topology = machine(sockets, nodes, cores, 2)
    if reserve >= len(topology.cores):
        with pytest.raises(LaunchError, match="--reserve-cores"):
            planned(topology, reserve_cores=reserve)
        return
    made = planned(topology, ranks=1, reserve_cores=reserve)
    used = {cpu for rank in made.ranks for cpu in rank.cpus}
    assert not used & set(made.reserved_cpus)
    assert len(made.reserved_cpus) == 2 * reserve
    assert len(used) == len(topology.cores) - reserve
    by_socket = [
        sum(core.socket == s and core.cpus[0] in used for core in topology.cores)
        for s in range(sockets)
    ]
    assert max(by_socket) - min(by_socket) <= 1
    assert any("kept free" in reason for reason in made.reasons)


def test_one_rank_per_socket_even_with_several_nodes_each() -> None:
    for wishes in ({}, {"ranks": 2}, {"rank_per": "socket"}):
        made = planned(machine(2, 4, 3, smt=2), **wishes)
        assert [rank.nodes for rank in made.ranks] == [(0, 1, 2, 3), (4, 5, 6, 7)]
        assert [rank.memory_policy for rank in made.ranks] == ["bind", "bind"]
        assert any("--rank-per node" in reason for reason in made.reasons)
    made = planned(machine(2, 4, 3), ranks=4)
    assert [rank.nodes for rank in made.ranks] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_one_rank_per_node_or_cache() -> None:
    topology = machine(2, 2, 4, l3_size=2)
    assert [rank.nodes for rank in planned(topology, rank_per="node").ranks] == [(0,), (1,), (2,), (3,)]
    made = planned(topology, rank_per="l3")
    assert [rank.cpus for rank in made.ranks] == [(i, i + 1) for i in range(0, 16, 2)]
    made = planned(topology, rank_per="node", ranks=2)
    assert [rank.cpus for rank in made.ranks] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert any("node 2, node 3 stay unused" in reason for reason in made.reasons)
    made = planned(topology, rank_per="node", ranks=8)
    assert [rank.cpus for rank in made.ranks] == [(i, i + 1) for i in range(0, 16, 2)]
    with pytest.raises(LaunchError, match="no L3 caches"):
        planned(machine(1, 1, 4), rank_per="l3")


def test_a_list_of_cpus_is_used_as_it_is() -> None:
    topology = machine(2, 1, 4, smt=2)
    made = planned(topology, core_list=(1, 2, 3, 5, 6, 7))
    assert [rank.cpus for rank in made.ranks] == [(1, 2, 3), (5, 6, 7)]
    made = planned(topology, core_list=(0, 8, 1, 4, 5))  # 0 and 8 are one core
    assert [rank.cpus for rank in made.ranks] == [(0, 1, 8), (4, 5)]
    assert any("0,8 are one core" in reason for reason in made.reasons)
    with pytest.raises(LaunchError, match="not 16-17"):
        planned(topology, core_list=(0, 16, 17))
    with pytest.raises(LaunchError, match="--bind-core-list"):
        planned(topology, core_list=())


def test_hardware_threads_and_cores_per_rank() -> None:
    topology = machine(2, 1, 4, smt=2)
    assert planned(topology, smt=True).ranks[1].cpus == (4, 5, 6, 7, 12, 13, 14, 15)
    assert planned(topology, smt=True).ranks[1].num_threads == 8
    made = planned(topology, cores_per_rank=3)
    assert [rank.cpus for rank in made.ranks] == [(0, 1, 2), (4, 5, 6)]
    assert any("1 of 4 cores stay unused" in reason for reason in made.reasons)
    with pytest.raises(LaunchError, match="socket 0 has 4 cores"):
        planned(topology, cores_per_rank=5)
    with pytest.raises(LaunchError, match="at least 1"):
        planned(topology, cores_per_rank=0)


def test_memory_near_the_cores() -> None:
    topology = with_hbm(machine(2, 1, 2))
    made = planned(topology)
    assert [rank.preferred_nodes for rank in made.ranks] == [(2,), (3,)]
    assert [rank.nodes for rank in made.ranks] == [(0, 2), (1, 3)]
    assert {rank.memory_policy for rank in made.ranks} == {"preferred"}
    assert any("HBM is preferred" in reason for reason in made.reasons)
    assert any("4 (cxl)" in reason for reason in made.reasons)
    made = planned(topology, numa_memory="bind")
    assert [(rank.nodes, rank.memory_policy) for rank in made.ranks] == [
        ((0, 2), "bind"),
        ((1, 3), "bind"),
    ]
    for policy in ("interleave", "preferred", "none"):
        assert {r.memory_policy for r in planned(machine(1, 2, 2), numa_memory=policy).ranks} == {
            policy
        }
    without = replace(topology, nodes=tuple(replace(n, memory_bytes=0) for n in topology.nodes))
    made = planned(without)
    assert {rank.memory_policy for rank in made.ranks} == {"none"}
    assert any("have no memory" in reason for reason in made.reasons)


def test_gpus_and_the_cores_beside_them() -> None:
    topology = machine(2, 1, 4, gpus=4)
    made = planned(topology, rank_per="gpu")
    assert [rank.device for rank in made.ranks] == [f"cuda:{i}" for i in range(4)]
    assert [rank.cpus for rank in made.ranks] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [rank.nodes for rank in made.ranks] == [(0,), (0,), (1,), (1,)]
    assert made.backend == "nccl"
    assert planned(topology, rank_per="gpu", comm="gloo").backend == "gloo"
    assert len(planned(topology, rank_per="gpu", ranks=2).ranks) == 2
    shared = planned(machine(1, 1, 4, gpus=1), rank_per="gpu", ranks=2, comm="gloo")
    assert [rank.device for rank in shared.ranks] == ["cuda:0", "cuda:0"]
    assert any("2 ranks share 1 GPUs" in reason for reason in shared.reasons)
    with pytest.raises(LaunchError, match="4 GPUs are visible, 5 ranks"):
        planned(topology, rank_per="gpu", ranks=5)
    with pytest.raises(LaunchError, match="0 GPUs"):
        planned(machine(1, 1, 1), rank_per="gpu")
    with pytest.raises(LaunchError, match="--comm nccl"):
        planned(topology, comm="nccl")
    assert any("--rank-per gpu" in reason for reason in planned(topology).reasons)


def test_cores_without_a_socket_count_by_node() -> None:
    topology = machine(2, 1, 2)
    lost = tuple(replace(core, socket=None) if core.node else core for core in topology.cores)
    made = planned(replace(topology, sockets=topology.sockets[:1], cores=lost))
    assert [rank.cpus for rank in made.ranks] == [(0, 1), (2, 3)]


def test_slow_cores_are_told() -> None:
    topology = machine(1, 1, 4)
    kinds = ("performance", "performance", "efficiency", "efficiency")
    cores = tuple(replace(c, kind=k) for c, k in zip(topology.cores, kinds, strict=True))
    made = planned(replace(topology, cores=cores))
    assert made.ranks[0].cpus == (0, 1, 2, 3)
    assert any("--bind-core-list 0-1" in reason for reason in made.reasons)


def test_a_remainder_of_cores_is_used_and_said() -> None:
    made = planned(machine(1, 1, 7), ranks=3)
    assert [rank.num_threads for rank in made.ranks] == [3, 2, 2]
    assert any("one more" in reason for reason in made.reasons)
    uneven = machine(2, 1, 4)
    made = planned(replace(uneven, cores=uneven.cores[:5]))
    assert any("--cores-per-rank 1 makes them equal" in reason for reason in made.reasons)


def test_without_the_flag_nothing_is_bound() -> None:
    made = plan_launch(machine(2, 1, 4), LaunchRequest())
    assert [rank.cpus for rank in made.ranks] == [tuple(range(8))] * 2
    assert [rank.num_threads for rank in made.ranks] == [4, 4]
    assert {rank.memory_policy for rank in made.ranks} == {"none"}
    assert any("--bind-cores-to-rank" in reason for reason in made.reasons)


@pytest.mark.parametrize("ranks", [0, -1, 65])
def test_impossible_numbers_of_ranks_are_refused(ranks: int) -> None:
    with pytest.raises(LaunchError, match=f"--ranks {ranks}"):
        planned(machine(1, 1, 1), ranks=ranks)


def test_flags_in_both_spellings_mean_the_same() -> None:
    for s in "-_":
        words = f"--bind{s}cores{s}to{s}rank --bind{s}core{s}list 0-2,5 --cores{s}per{s}rank 2"
        words += f" --reserve{s}cores 1 --rank{s}per node --numa{s}memory interleave --smt plan"
        assert parse_flags(words.split()).request == LaunchRequest(
            rank_per="node", bind_cores=True, core_list=(0, 1, 2, 5), cores_per_rank=2,
            reserve_cores=1, smt=True, numa_memory="interleave",
        )  # fmt: skip
    for words in ("--rank-per l3", "--bind-core-list 0", "--cores-per-rank 1", "--smt"):
        assert parse_flags([*words.split(), "plan"]).request.binds
    assert not parse_flags(["--ranks", "2", "plan"]).request.binds


@pytest.mark.parametrize(
    "words",
    ["--rank-per core", "--numa-memory all", "--bind-core-list 5-2", "--bind-core-list x",
     "--reserve-cores -1", "--grace nan", "--hang-timeout -1", "--comm-timeout 0", "--ranks two",
     "--unknown", "fly", "--sysfs /tmp model=tiny", "--nnodes 2", "--nnodes 0",
     "--nnodes 2 --node-rank 2 --rdzv-endpoint a:1", "--nnodes 2 --node-rank 0 --rdzv-endpoint a"],
)  # fmt: skip
def test_flags_that_make_no_sense_end_with_2(run_yoke: RunYoke, words: str) -> None:
    more = [] if "fly" in words or "model" in words else ["model=tiny", "weights=random", "prompt=x"]
    result = run_yoke(*words.split(), *more, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_the_plan_for_programs_and_for_people() -> None:
    topology = machine(2, 2, 2)
    made = planned(topology, comm="gloo")
    data = json.loads(json.dumps(plan_to_json(topology, made)))
    assert data.keys() >= {"topology", "ranks", "backend", "reasons"}
    assert data["topology"].keys() == {
        "sockets", "nodes", "cores", "gpus", "allowed_cpus", "allowed_nodes",
    }  # fmt: skip
    assert data["ranks"][1] == {
        "rank": 1, "device": "cpu", "nodes": [2, 3], "cpus": [4, 5, 6, 7], "num_threads": 4,
        "memory_policy": "bind", "preferred_nodes": [],
    }  # fmt: skip
    text = render_plain(topology, made)
    assert "rank 1  4 threads, bound to cpus 4-7, memory bind 2-3" in text
    assert "16.0 GiB" in text


def test_memory_is_divided_by_what_ranks_need() -> None:
    topology = machine(2, 1, 2)  # 16 GiB each
    made = planned(topology)
    needs = [{"weights": 12 << 30}, {"weights": 15 << 30, "kv_cache": 2 << 30}]
    fits = check_fit(topology, made, needs)
    assert [fit.fits for fit in fits] == [True, False]
    assert fits[1].available_bytes == 16 << 30
    with pytest.raises(LaunchError, match=r"rank 1 needs 17\.0 GiB .*has 16\.0 GiB"):
        require_fit(fits)
    # Not bound, the same ranks share the whole machine.
    assert all(fit.fits for fit in check_fit(topology, plan_launch(topology, LaunchRequest()), needs))
    # A cgroup's limit holds for all together.
    assert not any(fit.fits for fit in check_fit(topology, made, needs, limit_bytes=20 << 30))
    # Two ranks on one node have it together.
    fits = check_fit(topology, planned(topology, ranks=4), [{"weights": 9 << 30}] * 4)
    assert not any(fit.fits for fit in fits)


def test_the_command_says_whether_a_model_fits(run_yoke: RunYoke) -> None:
    words = ["plan", "--bind-cores-to-rank", "weights=random"]
    result = run_yoke(*words, "model=tiny", timeout=120)
    assert "fits" in result.stdout and "DOES NOT" not in result.stdout
    result = run_yoke(*words, "model=llama-70b", "dtype=float32", "--json", timeout=120)
    assert result.returncode == 0
    memory = json.loads(result.stdout)["memory"]
    weights = 4 * 68_976_648_192  # the parameters of Llama 2 70B
    assert sum(rank["needs"]["weights"] for rank in memory) == pytest.approx(weights, rel=1e-6)
    if not all(rank["fits"] for rank in memory):
        result = run_yoke("weights=random", "model=llama-70b", "dtype=float32", "prompt=x", timeout=120)
        assert result.returncode == 2
        assert result.stderr.startswith("error: rank 0 needs")


def test_a_quota_below_the_cores_is_a_reason(run_yoke: RunYoke, tmp_path: Path) -> None:
    from tests.launcher.trees import two_sockets, write

    files = two_sockets() | {
        "proc/self/cgroup": "0::/job",
        "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0",
        "sys/fs/cgroup/job/cpu.max": "150000 100000",
    }
    result = run_yoke("plan", "--sysfs", str(write(tmp_path, files)), "--bind-cores-to-rank")
    assert result.returncode == 0, result.stderr
    assert "quota is 1.5 cpus, and the ranks use 8" in result.stdout


@pytest.mark.parametrize("unit", ["socket", "node", "l3"])
def test_the_drawing_shows_every_core_in_its_ranks_color(unit: str, tmp_path: Path) -> None:
    import os
    import pty
    import subprocess
    import sys

    from tests.launcher.trees import two_sockets, write
    from tests.running import CHECKOUT

    root = write(tmp_path, two_sockets())
    master, slave = pty.openpty()
    words = [
        sys.executable,
        str(CHECKOUT / "launch.py"),
        "plan",
        "--sysfs",
        str(root),
        "--rank-per",
        unit,
    ]
    environ = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": ""}
    subprocess.run(words, stdout=slave, env=environ, check=True, timeout=60)
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 65536):
            text += chunk
    except OSError:  # how a pseudo-terminal ends
        pass
    os.close(master)
    ranks = {"socket": 2, "node": 4, "l3": 4}[unit]
    drawn = text.decode()
    assert drawn.count("■") == 8 + ranks  # the cores, and the ranks' names
    assert "socket 0" in drawn and "socket 1" in drawn
    assert "\x1b[36m" in drawn and "\x1b[35m" in drawn
