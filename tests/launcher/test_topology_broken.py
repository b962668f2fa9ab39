"""Trees of sysfs in which something is missing, contradicts itself, or is nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base.errors import LaunchError
from launcher.machine.topology import read_topology
from tests.launcher.trees import CPU, NODE, gpus, memory_only, two_sockets, with_mask, write


def test_sets_that_contradict_each_other_are_left_out(tmp_path: Path) -> None:
    files = two_sockets()
    files[f"{CPU}/cpu2/topology/thread_siblings_list"] = "0,2"
    files[f"{CPU}/cpu4/cache/index3/shared_cpu_list"] = "3-4"
    topology = read_topology(write(tmp_path, files))
    assert [core.cpus for core in topology.cores][:4] == [(0, 8), (1, 9), (2,), (3, 11)]
    assert [core.l3 for core in topology.cores if core.node == 2] == [None, None]
    assert len(topology.notes) == 2


def test_what_is_missing_is_replaced_and_said(tmp_path: Path) -> None:
    files = {name: text for name, text in two_sockets().items() if not name.startswith(NODE)}
    topology = read_topology(write(tmp_path / "a", files))
    assert [node.id for node in topology.nodes] == [0]
    assert "is missing" in topology.notes[0]
    topology = read_topology(write(tmp_path / "a1", files | with_mask("0-15", "1")))
    assert [node.id for node in topology.nodes] == [1]  # the only one that may be used
    files = {name: text for name, text in two_sockets().items() if "package" not in name}
    topology = read_topology(write(tmp_path / "b", files))
    assert [socket.id for socket in topology.sockets] == [0, 1, 2, 3]  # by node
    assert "name no socket" in topology.notes[0]
    files = two_sockets() | {f"{CPU}/cpu{cpu}/topology/physical_package_id": "-1" for cpu in (1, 9)}
    topology = read_topology(write(tmp_path / "c", files))
    assert topology.cores[1].socket == 0  # as the rest of its node
    files = {name: text for name, text in two_sockets().items() if "thread_sib" not in name}
    topology = read_topology(write(tmp_path / "d", files))
    assert len(topology.cores) == 16 and "list no hardware threads" in topology.notes[0]
    files = {name: text for name, text in two_sockets().items() if "node1/" not in name}
    topology = read_topology(write(tmp_path / "e", files))
    assert topology.cores[2].node == 0 and "name no memory node" in topology.notes[0]


def test_nonsense_is_refused(tmp_path: Path) -> None:
    for text in ("0-", "7-3", "a,b", "-1", "0-99999999", "0-99999999999"):
        with pytest.raises(LaunchError, match="cpu/online: "):
            read_topology(write(tmp_path, {f"{CPU}/online": text}))
    with pytest.raises(LaunchError, match="lists no cpus"):
        read_topology(tmp_path / "empty")


RICH = {
    **two_sockets(),
    **memory_only(9, "31 31 21 31 10", 400),
    **gpus(),
    **with_mask("0-15", "0-9"),
    f"{CPU}/cpu0/cpu_capacity": "1024",
    "sys/devices/cpu_core/cpus": "0-5",
    "sys/devices/cpu_atom/cpus": "6-7",
    "proc/driver/nvidia/gpus/0000:3b:00.0/numa_status": "Node: 9",
    "proc/meminfo": "MemTotal: 8192 kB",
    "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nnone /cpu cgroup rw,cpuset,memory 0 0",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
    "proc/self/cgroup": "2:cpuset,memory:/a\n0::/a/b",
    "proc/self/cpuset": "/a/b",
    "sys/fs/cgroup/a/b/cpuset.cpus.effective": "0-15",
    "sys/fs/cgroup/a/b/cpuset.mems.effective": "0-3",
    "sys/fs/cgroup/a/memory.max": "123456",
    "sys/fs/cgroup/a/cpu.max": "50000 100000",
}


NONSENSE = st.one_of(
    st.sampled_from(
        [
            "",
            "-1",
            "0-99999999",
            "0-65535",
            "9" * 5000,
            "7-3",
            "0",
            "0-15",
            "ffff",
            "ff,,",
            "1 2 3",
            "\0",
        ]
    ),
    st.sampled_from(sorted(RICH.values())),
    st.binary(max_size=40),
)


DELETED, FOLDER, LOOP = "deleted", "a folder", "a symlink loop"


def spoil(path: Path, what: object) -> None:
    if not path.is_file():  # an earlier change took its folder
        return
    path.unlink()
    if what is FOLDER:
        path.mkdir()
    elif what is LOOP:
        path.symlink_to(path.name)
    elif what is not DELETED:
        path.write_bytes(what if isinstance(what, bytes) else str(what).encode())


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(RICH)),
        st.one_of(st.sampled_from([DELETED, FOLDER, LOOP]), NONSENSE),
        min_size=1,
        max_size=12,
    ),
    visible=st.one_of(st.none(), st.text(max_size=10)),
)
def test_a_broken_tree_is_read_or_refused(
    changes: dict[str, object], visible: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = write(tmp_path_factory.mktemp("broken"), RICH)
    for name, what in changes.items():
        spoil(root / name, what)
    try:
        topology = read_topology(root, visible)
    except LaunchError:
        return
    cpus = [cpu for core in topology.cores for cpu in core.cpus]
    assert sorted(cpus) == sorted(set(cpus)) == list(topology.allowed_cpus)
    listed = {socket.id for socket in topology.sockets}
    assert {core.socket for core in topology.cores} <= listed | {None}
    assert {node.socket for node in topology.nodes} <= listed | {None}
    assert set(topology.allowed_nodes) <= {node.id for node in topology.nodes}
