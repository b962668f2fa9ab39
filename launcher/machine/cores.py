"""Processors: which package each cpu is in, which cpus are one physical core, which share an L3 cache.

The kernel describes each of these as a set of cpus, repeated for every member. Such sets can contradict
each other (odd firmware, broken virtual machines). A set is accepted if its first member lists it and
it does not partly overlap another set. Other sets are dropped with a note, rather than guessed at.

What is not here: dies, clusters, books and drawers, and caches other than L3.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from launcher.machine.sysfs import format_cpu_list, read_cpus, read_int, read_list

# The usual index of L3 comes first. s390 has two L2 caches before it; old Xeons have L3 as index2.
_L3_INDEXES = ("index3", "index4", "index2", "index1", "index0")
# Fraction of the largest capacity: big Arm cores of a machine differ by a tenth, small ones have at
# most half.
_BIG_CAPACITY = 0.75


@dataclass(frozen=True)
class Core:
    """A physical core; `cpus` are its usable logical cpus, first hardware thread first.

    `socket` is None if the kernel contradicts itself; `node` is the lowest usable memory node that
    lists the cpus; `l3` is equal for all cores that share an L3 cache (None: unknown); `kind` is
    "performance" or "efficiency" on hybrid machines.
    """

    id: int
    socket: int | None
    node: int
    cpus: tuple[int, ...]
    l3: int | None = None
    kind: str = ""


def read_sockets(
    base: str, online: tuple[int, ...], node_of: Mapping[int, int], notes: list[str]
) -> dict[int, int | None]:
    """The package of each online cpu."""
    folder = f"{base}/sys/devices/system/cpu"
    members: dict[int, list[int]] = {}
    unnamed: list[int] = []
    for cpu in online:
        package = read_int(f"{folder}/cpu{cpu}/topology/physical_package_id")
        # Some Arm kernels have -1 here, and in some containers the file is missing.
        if package is None or package < 0:
            unnamed.append(cpu)
        else:
            members.setdefault(package, []).append(cpu)
    socket_of: dict[int, int | None] = {
        cpu: package for package, cpus in members.items() for cpu in cpus
    }
    wrong: dict[int, set[int]] = {}
    for package in sorted(members):
        cpus = set(members[package])
        own = _package_siblings(folder, min(cpus), cpus) & socket_of.keys()
        if not own <= cpus:
            wrong[package] = own - cpus
            continue
        # s390 counts the sockets of each book from 0: several disjoint sets then have the same number.
        cpus -= own
        while cpus and min(cpus) in (own := _package_siblings(folder, min(cpus), cpus)) and own <= cpus:
            number = max(filter(None, socket_of.values()), default=0) + 1
            notes.append(
                f"package {package} is several: cpus {format_cpu_list(own)} are numbered {number}"
            )
            socket_of |= dict.fromkeys(own, number)
            cpus -= own
    if len(wrong) < len(members):
        for package, others in wrong.items():
            notes.append(
                f"package {package} claims cpus {format_cpu_list(others)} of other packages: it is "
                f"dropped, and cpus {format_cpu_list(members[package])} have no socket"
            )
            socket_of |= dict.fromkeys(members[package])
    elif wrong:
        notes.append("the sibling lists contradict every package's number: the numbers are used")
    if unnamed:
        _infer_sockets(socket_of, unnamed, node_of, notes)
    return socket_of


def _package_siblings(folder: str, cpu: int, default: set[int]) -> set[int]:
    topology = f"{folder}/cpu{cpu}/topology"
    listed = read_cpus(f"{topology}/package_cpus", f"{topology}/package_cpus_list") or read_cpus(
        f"{topology}/core_siblings", f"{topology}/core_siblings_list"
    )
    return set(listed or default)


def _infer_sockets(
    socket_of: dict[int, int | None],
    unnamed: list[int],
    node_of: Mapping[int, int],
    notes: list[str],
) -> None:
    """Assign cpus that name no package to the socket of their memory node."""
    text = f"cpus {format_cpu_list(unnamed)} name no socket"
    if not socket_of:
        notes.append(f"{text}: each memory node is treated as one")
        socket_of |= {cpu: node_of[cpu] for cpu in unnamed}
        return
    notes.append(f"{text}: they get the socket of their memory node, if it is in one socket only")
    named: dict[int, set[int | None]] = {}
    for cpu, socket in socket_of.items():
        named.setdefault(node_of[cpu], set()).add(socket)
    for cpu in unnamed:
        owners = named.get(node_of[cpu], set())
        socket_of[cpu] = next(iter(owners)) if len(owners) == 1 else None


def read_cores(
    base: str,
    online: tuple[int, ...],
    allowed: Collection[int],
    node_of: Mapping[int, int],
    socket_of: Mapping[int, int | None],
    notes: list[str],
) -> tuple[Core, ...]:
    """The cores with usable cpus, ordered by socket, node and first cpu; cores without a socket
    last."""
    first_thread = _first_threads(base, online, notes)
    l3_of = _l3_caches(base, online, socket_of, notes)
    threads: dict[tuple[int | None, int, int], list[int]] = {}
    for cpu in sorted(allowed):
        key = (socket_of[cpu], node_of[cpu], first_thread.get(cpu, cpu))
        threads.setdefault(key, []).append(cpu)
    order = sorted(threads, key=lambda key: (key[0] is None, key[0] or 0, *key[1:]))
    kinds = _kinds(base, online, first_thread)
    return tuple(
        Core(
            index,
            key[0],
            key[1],
            tuple(threads[key]),
            l3_of.get(threads[key][0]),
            kinds.get(threads[key][0], ""),
        )
        for index, key in enumerate(order)
    )


def _first_threads(base: str, online: tuple[int, ...], notes: list[str]) -> dict[int, int]:
    folder = f"{base}/sys/devices/system/cpu"

    @functools.cache
    def core_id(cpu: int) -> int | None:
        return read_int(f"{folder}/cpu{cpu}/topology/core_id")

    def siblings(cpu: int) -> tuple[int, ...] | None:
        topology = f"{folder}/cpu{cpu}/topology"
        cpus = read_cpus(f"{topology}/core_cpus", f"{topology}/core_cpus_list") or read_cpus(
            f"{topology}/thread_siblings", f"{topology}/thread_siblings_list"
        )
        # AMD's Bulldozer lists the two cores of a module as threads, but gives them different core ids.
        return cpus and tuple(other for other in known & set(cpus) if core_id(other) == core_id(cpu))

    known = set(online)
    first, unlisted, wrong = _partition(online, siblings, lambda cpus: True)
    if unlisted:
        notes.append(
            f"cpus {format_cpu_list(unlisted)} list no hardware threads: each is treated as a core"
        )
    if wrong:
        notes.append(
            f"cpus {format_cpu_list(wrong)} list hardware threads that contradict other cpus: each is "
            "treated as a core"
        )
    return first


def _l3_caches(
    base: str, online: tuple[int, ...], socket_of: Mapping[int, int | None], notes: list[str]
) -> dict[int, int]:
    packages: dict[int, set[int]] = {}
    for cpu, socket in socket_of.items():
        if socket is not None:
            packages.setdefault(socket, set()).add(cpu)

    def sharers(cpu: int) -> tuple[int, ...] | None:
        folder = f"{base}/sys/devices/system/cpu/cpu{cpu}/cache"
        for index in _L3_INDEXES:
            if read_int(f"{folder}/{index}/level") == 3:
                return read_cpus(
                    f"{folder}/{index}/shared_cpu_map", f"{folder}/{index}/shared_cpu_list"
                )
        return None

    def nests(cpus: set[int]) -> bool:
        """Whether the cpus are inside one package, or are whole packages (virtual machines often make
        each cpu a package)."""
        touched = {socket for cpu in cpus if (socket := socket_of[cpu]) is not None}
        return all(cpus <= packages[socket] or packages[socket] <= cpus for socket in touched)

    first, _, wrong = _partition(online, sharers, nests)
    if wrong:
        notes.append(
            f"cpus {format_cpu_list(wrong)} list an L3 cache that contradicts other cpus or the "
            "packages: the L3 cache is ignored"
        )
    return first


def _partition(
    online: Iterable[int],
    listed: Callable[[int], tuple[int, ...] | None],
    acceptable: Callable[[set[int]], bool],
) -> tuple[dict[int, int], list[int], list[int]]:
    """The first member of each cpu's set; the cpus that list no set; those whose set is not accepted.

    The files of a cpu in an accepted set are not read again, so a machine with few sets is read
    quickly.
    """
    known = set(online)
    first: dict[int, int] = {}
    unlisted: list[int] = []
    wrong: list[int] = []
    for cpu in sorted(known):
        if cpu in first:
            continue
        cpus = listed(cpu)
        members = known.intersection(cpus or ())
        if not cpus:
            unlisted.append(cpu)
        elif not members or min(members) != cpu or members & first.keys() or not acceptable(members):
            wrong.append(cpu)
        else:
            first |= dict.fromkeys(members, cpu)
    return first, unlisted, wrong


def _kinds(base: str, online: tuple[int, ...], first_thread: Mapping[int, int]) -> dict[int, str]:
    """The kind of each cpu on a hybrid machine; empty elsewhere."""
    devices = f"{base}/sys/devices"  # Intel: one performance monitoring unit for each kind
    fast = set(read_list(f"{devices}/cpu_core/cpus") or ())
    slow = {
        cpu
        for name in ("cpu_atom", "cpu_lowpower")
        for cpu in read_list(f"{devices}/{name}/cpus") or ()
    }
    if not fast or not slow:  # Arm
        capacity = _read_by_cpu(base, online, "cpu_capacity")
        enough = _BIG_CAPACITY * max(capacity.values(), default=0)
        fast = {cpu for cpu, amount in capacity.items() if amount >= enough}
        slow = capacity.keys() - fast
    if not fast or not slow:
        # Intel without those units. The clock rate alone is not enough: servers can give a few of their
        # equal cores a higher one (Speed Select). Efficiency cores also have only one thread.
        clock = _read_by_cpu(base, online, "cpufreq/base_frequency")
        fast = {cpu for cpu, rate in clock.items() if rate == max(clock.values())}
        slow = clock.keys() - fast
        num_threads = Counter(first_thread.values())
        if any((num_threads[first_thread.get(cpu, cpu)] > 1) != (cpu in fast) for cpu in clock):
            return {}
    if not fast or not slow:
        return {}
    return dict.fromkeys(fast, "performance") | dict.fromkeys(slow, "efficiency")


def _read_by_cpu(base: str, online: tuple[int, ...], name: str) -> dict[int, int]:
    """The number in the file `name` of each cpu. If the first cpu has none, the others are not read and
    the result is empty."""
    folder = f"{base}/sys/devices/system/cpu"
    if read_int(f"{folder}/cpu{online[0]}/{name}") is None:
        return {}
    numbers = ((cpu, read_int(f"{folder}/cpu{cpu}/{name}")) for cpu in online)
    return {cpu: number for cpu, number in numbers if number is not None}
