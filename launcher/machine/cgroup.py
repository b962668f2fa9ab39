"""The limits of this process's cgroup: cpus, memory nodes, bytes of memory, cpu time.

Versions 1 and 2, mixtures of both, and the older cpuset file system are read. An ancestor's limit
applies too, so each limit is looked up from the process's own group up to the mount point.

What is not here: changing anything, and limits above the mounted part, which a container cannot see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.machine.sysfs import prefix, read, read_int, read_list

# Version 1 writes "no limit" as the largest multiple of the page size below 2^63.
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Cgroup:
    """The limits. None: no limit, or unknown.

    `memory_used_bytes` is the usage of the group that has the limit (an ancestor's usage includes its
    other groups); without a limit, that of the process's own group. `cpu_quota` is in cpus.
    """

    cpus: tuple[int, ...] | None
    nodes: tuple[int, ...] | None
    memory_limit_bytes: int | None
    memory_used_bytes: int | None
    cpu_quota: float | None


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy: `root` is the group that is mounted at `point`."""

    point: str
    root: str
    version: int
    controllers: tuple[str, ...]


def read_cgroup(root: Path) -> Cgroup:
    """The limits of this process, or of the one that recorded the tree below `root`."""
    base = prefix(root)
    mounts, paths = _mounts(base), _paths(base)
    cpusets = list(_folders(base, mounts, paths, "cpuset"))
    cpus = _first_list(cpusets, ("cpuset.cpus.effective", "cpuset.cpus", "cpus"))
    nodes = _first_list(cpusets, ("cpuset.mems.effective", "cpuset.mems", "mems"))
    limit, used = _memory(list(_folders(base, mounts, paths, "memory")))
    quotas = [
        quota
        for folder in _folders(base, mounts, paths, "cpu")
        if (quota := _cpu_quota(folder)) is not None
    ]
    return Cgroup(cpus, nodes, limit, used, min(quotas, default=None))


def _mounts(base: str) -> tuple[_Mount, ...]:
    # mountinfo also names the group at the mount point, which in a container is not the root group.
    text = read(f"{base}/proc/self/mountinfo")
    if text:
        rows = [_mountinfo_row(line) for line in text.split("\n")]
    else:
        text = read(f"{base}/proc/mounts") or read(f"{base}/proc/self/mounts") or ""
        rows = [_mounts_row(line) for line in text.split("\n")]
    found = []
    for point, group, kind, options in filter(None, rows):
        if kind == "cgroup2":
            found.append(_Mount(point, group, 2, ()))
        elif kind in ("cgroup", "cpuset"):
            names = ("cpuset",) if kind == "cpuset" else tuple(options.split(","))
            found.append(_Mount(point, group, 1, names))
    return tuple(found)


def _mountinfo_row(line: str) -> tuple[str, str, str, str] | None:
    left, _, right = line.partition(" - ")
    fields, rest = left.split(" "), right.split(" ")
    if len(fields) < 5 or len(rest) < 3:
        return None
    return _unescaped(fields[4]), _unescaped(fields[3]), rest[0], rest[2]


def _mounts_row(line: str) -> tuple[str, str, str, str] | None:
    fields = line.split(" ")  # only spaces and line feeds in names are escaped
    return (_unescaped(fields[1]), "/", fields[2], fields[3]) if len(fields) >= 4 else None


def _unescaped(path: str) -> str:
    """The path with octal escapes replaced: a mount table escapes blanks."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _paths(base: str) -> dict[str, str]:
    """The group of this process for each version 1 controller; the key "" is version 2."""
    paths: dict[str, str] = {}
    for line in (read(f"{base}/proc/self/cgroup") or "").split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number.isdigit() and path.startswith("/"):
            paths |= dict.fromkeys(controllers.split(","), path)
    cpuset = read(f"{base}/proc/self/cpuset")
    if cpuset and cpuset.startswith("/"):
        paths.setdefault("cpuset", cpuset)
        paths.setdefault("", cpuset)
    return paths


def _folders(
    base: str, mounts: tuple[_Mount, ...], paths: dict[str, str], controller: str
) -> Iterator[str]:
    """The folders that can limit this process, from its own group up to the mount point."""
    for mount in mounts:
        if mount.version == 1 and controller not in mount.controllers:
            continue
        path = paths.get(controller if mount.version == 1 else "", "/")
        group = mount.root.rstrip("/")
        inside = path[len(group) :] if f"{path}/".startswith(f"{group}/") else path
        parts = [part for part in inside.split("/") if part]
        # The group is outside what the container sees: use the nearest known group, at the mount point.
        if ".." in parts:
            parts = []
        for depth in range(len(parts), -1, -1):
            yield "/".join((base + mount.point.rstrip("/"), *parts[:depth]))


def _first_list(folders: list[str], names: tuple[str, ...]) -> tuple[int, ...] | None:
    """The list of the nearest group that has one: a group with an empty list inherits its parent's."""
    for folder in folders:
        for name in names:
            if listed := read_list(f"{folder}/{name}"):
                return listed
    return None


def _memory(folders: list[str]) -> tuple[int | None, int | None]:
    """The lowest limit, and the usage of the group that has it, in bytes."""
    groups = []
    for folder in folders:
        limit = _first_int(folder, ("memory.max", "memory.limit_in_bytes"))
        used = _first_int(folder, ("memory.current", "memory.usage_in_bytes"))
        if limit is not None or used is not None:
            groups.append((None if limit is None or limit >= _UNLIMITED else limit, used))
    limited = [(limit, used) for limit, used in groups if limit is not None]
    if limited:
        return min(limited, key=lambda group: group[0])
    return None, groups[0][1] if groups else None


def _first_int(folder: str, names: tuple[str, ...]) -> int | None:
    numbers = (read_int(f"{folder}/{name}") for name in names)
    return next((number for number in numbers if number is not None and number >= 0), None)


def _cpu_quota(folder: str) -> float | None:
    """ "200000 100000" -> 2.0 cpus; None if there is no quota ("max 100000", or -1)."""
    fields = (read(f"{folder}/cpu.max") or "").split()
    if len(fields) == 2 and all(re.fullmatch(r"[0-9]{1,18}", field) for field in fields):
        quota, period = int(fields[0]), int(fields[1])
    else:
        quota = read_int(f"{folder}/cpu.cfs_quota_us") or 0
        period = read_int(f"{folder}/cpu.cfs_period_us") or 0
    return quota / period if quota > 0 and period > 0 else None
