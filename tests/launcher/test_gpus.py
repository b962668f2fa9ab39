"""NVIDIA GPUs of a recorded tree, and which of them CUDA_VISIBLE_DEVICES leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.machine.gpus import Gpu, read_gpus
from launcher.machine.topology import read_topology
from tests.launcher.trees import GPU_UUIDS, NODE, gpus, memory_only, two_sockets, write

FIRST, SECOND, THIRD = "0000:3b:00.0", "0000:5e:00.0", "10000:01:00.0"


def test_gpus_are_those_of_the_bus_in_its_order(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, two_sockets() | gpus()))
    near = (4, 5, 6, 7, 12, 13, 14, 15)
    assert topology.gpus == (
        Gpu(0, FIRST, None, near, GPU_UUIDS[0]),  # -1: the firmware does not tell the node
        Gpu(1, SECOND, 2, near, GPU_UUIDS[1]),
        Gpu(2, THIRD, 3, near, GPU_UUIDS[2]),  # a domain of five digits is a higher number
    )
    assert topology.notes == ()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [FIRST, SECOND, THIRD]),
        ("2,0", [THIRD, FIRST]),
        (" 1 , 2", [SECOND, THIRD]),
        ("0,7,1", [FIRST]),  # the first that is wrong ends the list
        ("0,-1,1", [FIRST]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,1", []),
        ("GPU-bbbb,GPU-aaaa1111", [THIRD, FIRST]),
        ("GPU-aaaa", []),  # two begin like that
        ("MIG-1234", []),
        ("9" * 5000, []),
    ],
)
def test_visible_devices(visible: str | None, expected: list[str], tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, two_sockets() | gpus()), visible)
    assert [gpu.pci for gpu in topology.gpus] == expected
    assert [gpu.index for gpu in topology.gpus] == list(range(len(expected)))


def test_what_cuda_cannot_see_is_said(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, two_sockets() | gpus()), "0,7")
    assert "'7' names none of the 3 GPUs" in topology.notes[0]
    assert "twice" in read_topology(tmp_path, "1,1").notes[0]
    assert read_topology(tmp_path, "0,-1").notes == ()


def test_a_container_has_the_device_files_of_its_own_gpus(tmp_path: Path) -> None:
    write(tmp_path, gpus())
    notes: list[str] = []
    dev = tmp_path / "dev"
    assert read_gpus(str(tmp_path), range(16), None, str(dev), notes) == ()  # no driver
    write(dev, {"nvidiactl": "", "nvidia1": "", "nvidia2": ""})
    notes.clear()
    found = read_gpus(str(tmp_path), range(16), None, str(dev), notes)
    assert [(gpu.index, gpu.pci) for gpu in found] == [(0, SECOND), (1, THIRD)]
    assert FIRST in notes[0] and len(notes) == 1


def test_memory_of_a_gpu_is_no_memory_of_the_host(tmp_path: Path) -> None:
    files = two_sockets() | memory_only(255)
    files["proc/driver/nvidia/gpus/0004:05:00.0/numa_status"] = "Node:      255\nStatus:    online"
    files["proc/driver/nvidia/gpus/0004:06:00.0/numa_status"] = "Node:      1\nStatus:    online"
    topology = read_topology(write(tmp_path, files))
    assert (tmp_path / NODE / "node255").is_dir()
    assert [node.id for node in topology.nodes] == [0, 1, 2, 3]  # a node with cpus stays
