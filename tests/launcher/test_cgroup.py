"""Limits of control groups, of both versions, seen from outside and from inside a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.machine.cgroup import Cgroup, read_cgroup
from tests.launcher.trees import write

UNLIMITED_V1 = "9223372036854771712"
V2 = {
    "proc/mounts": "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0",
    "proc/self/cgroup": "0::/user.slice/job",
}
V1 = {
    "proc/mounts": (
        "tmpfs /sys/fs/cgroup tmpfs ro 0 0\n"
        "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n"
        "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
        "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0"
    ),
    "proc/self/cgroup": "7:cpuset:/set\n6:cpu,cpuacct:/slice/job\n5:memory:/slice/job\n1:name=x:/x",
}


def group(folder: str, **files: str) -> dict[str, str]:
    return {f"{folder}/{name.replace('__', '.')}": text for name, text in files.items()}


def test_nothing_told_is_nothing_limited(tmp_path: Path) -> None:
    assert read_cgroup(tmp_path) == Cgroup(None, None, None, None, None)
    assert read_cgroup(write(tmp_path, V2)) == Cgroup(None, None, None, None, None)


def test_version_2_takes_the_lowest_limit_up_to_the_mount(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files = V2 | group(f"{top}/user.slice/job", memory__max="max", memory__current="100")
    files |= group(f"{top}/user.slice/job", cpu__max="150000 100000", cpuset__cpus__effective="")
    files |= group(f"{top}/user.slice", memory__max="8192", memory__current="4096")
    files |= group(f"{top}/user.slice", cpu__max="max 100000", cpuset__cpus__effective="0-3")
    files |= group(top, cpuset__cpus__effective="0-7", cpuset__mems__effective="0-1")
    assert read_cgroup(write(tmp_path, files)) == Cgroup((0, 1, 2, 3), (0, 1), 8192, 4096, 1.5)


def test_version_2_without_limits_tells_what_is_used(tmp_path: Path) -> None:
    files = V2 | group("sys/fs/cgroup/user.slice/job", memory__max="max", memory__current="100")
    assert read_cgroup(write(tmp_path, files)) == Cgroup(None, None, None, 100, None)


def test_version_1(tmp_path: Path) -> None:
    files = V1 | group("sys/fs/cgroup/cpuset/set", cpuset__cpus="0-1,4", cpuset__mems="1")
    cpu, memory = "sys/fs/cgroup/cpu,cpuacct/slice", "sys/fs/cgroup/memory/slice"
    files |= group(f"{cpu}/job", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    files |= group(cpu, cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    files |= group(f"{memory}/job", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes="7")
    unlimited = read_cgroup(write(tmp_path / "a", files))
    assert unlimited == Cgroup((0, 1, 4), (1,), None, 7, 2.5)
    files |= group(memory, memory__limit_in_bytes="9000", memory__usage_in_bytes="8")
    assert read_cgroup(write(tmp_path / "b", files)) == Cgroup((0, 1, 4), (1,), 9000, 8, 2.5)


@pytest.mark.parametrize(
    "mount",
    ["none /dev/cpuset cpuset rw 0 0", "none /dev/cpuset cgroup rw,relatime,cpuset,noprefix 0 0"],
)
def test_cpusets_without_prefix(mount: str, tmp_path: Path) -> None:
    files = {"proc/mounts": mount, "proc/self/cpuset": "/batch/job"}
    files |= group("dev/cpuset/batch/job", cpus="0-3", mems="0")
    found = read_cgroup(write(tmp_path, files))
    assert (found.cpus, found.nodes) == ((0, 1, 2, 3), (0,))


INSIDE = group("sys/fs/cgroup", memory__max="4096", memory__current="1", cpu__max="50000 100000")


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # the host's names, and only this group is mounted
        ("/../../other", "/../../.."),  # outside of the namespace
        ("/docker/abc", None),  # the same, where no mountinfo says so
    ],
)
def test_inside_a_container(path: str, root: str | None, tmp_path: Path) -> None:
    files = V2 | INSIDE | {"proc/self/cgroup": f"0::{path}"}
    if root is not None:
        mount = f"31 23 0:28 {root} /sys/fs/cgroup ro,nosuid shared:9 master:1 - cgroup2 cgroup rw"
        files["proc/self/mountinfo"] = f"23 1 0:3 / / rw - overlay overlay rw\n{mount}"
    assert read_cgroup(write(tmp_path, files)) == Cgroup(None, None, 4096, 1, 0.5)


def test_a_group_below_the_mounted_one(tmp_path: Path) -> None:
    files = V2 | {"proc/self/cgroup": "0::/docker/abc/inner"}
    # The kernel escapes spaces and line feeds, and no other character that ends a line in Python.
    files["proc/self/mountinfo"] = (
        "30 23 0:27 / /a\x0cb\x1dc rw - tmpfs x rw\n"
        "31 23 0:28 /docker/abc /my\\040groups ro - cgroup2 cgroup rw"
    )
    files |= group("my groups/inner", memory__max="77")
    assert read_cgroup(write(tmp_path, files)).memory_limit_bytes == 77


def test_this_process() -> None:
    found = read_cgroup(Path("/"))
    assert found.cpu_quota is None or found.cpu_quota > 0
    assert found.memory_limit_bytes is None or found.memory_limit_bytes > 0
