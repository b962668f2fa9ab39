"""Check after binding where a rank's pages and threads really are.

Pages are counted exactly by `/proc/<pid>/numa_maps`. If that file is missing, the move_pages system
call reports the node of given addresses: evenly spread samples, so that a process of any size takes a
few milliseconds. If neither works, the source is "" and no placement is reported. Threads are read from
`/proc/<pid>/task`. A stray is a thread whose affinity mask has cpus outside the rank's, even if a
library set that on purpose.

Counted is the memory of the process alone: heap, stacks, anonymous memory, and its private copies of
file pages. Not counted are pages shared with other processes: the code of libraries, files mapped for
reading (weights too), and shared-memory segments, since the process that touched them first placed
them. Pages in swap are on no node and are not counted either.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.machine.topology import format_cpu_list, parse_cpu_list

_MOVE_PAGES = {"x86_64": 279, "aarch64": 239}  # system call numbers
_NUM_SAMPLES = 1 << 16  # about 7 ms; covers every page of a process of up to 256 MiB
_NUM_SHOWN_STRAYS = 4


@dataclass(frozen=True)
class Placement:
    """A rank's memory by node, in bytes, and its threads, compared with the planned `nodes` and `cpus`.
    `source` is "numa_maps", "move_pages" (sampled) or "" (unknown); `stray_threads` describes each
    thread that may run outside the cpus."""

    rank: int
    nodes: tuple[int, ...]
    cpus: tuple[int, ...]
    pages_by_node: dict[int, int]
    local_bytes: int
    total_bytes: int
    source: str
    stray_threads: tuple[str, ...]
    num_threads: int


@dataclass(frozen=True)
class Thread:
    """A thread's name, the cpus it may run on, and the one it ran on last."""

    name: str
    mask: tuple[int, ...]
    last_cpu: int


def check_placement(
    rank: int, nodes: Collection[int], cpus: Collection[int], root: Path = Path("/proc/self")
) -> Placement:
    """Read the placement of the process whose proc folder is `root`."""
    by_node, source = _read_pages(root)
    strays, num_threads = _read_threads(root / "task", cpus)
    return Placement(
        rank=rank,
        nodes=tuple(sorted(nodes)),
        cpus=tuple(sorted(cpus)),
        pages_by_node=by_node,
        local_bytes=sum(size for node, size in by_node.items() if node in nodes),
        total_bytes=sum(by_node.values()),
        source=source,
        stray_threads=strays,
        num_threads=num_threads,
    )


def _text(path: Path) -> str:
    """The file's text. Not read in text mode: names of threads and files may have a carriage return."""
    return path.read_bytes().decode(errors="replace")


def render_placement(placement: Placement) -> str:
    """One line for people."""
    return f"rank {placement.rank}: {_render_pages(placement)}; {_render_threads(placement)}"


def parse_numa_maps(text: str) -> dict[int, int]:
    """Bytes per node of the process's own memory, from the text of a numa_maps file."""
    by_node: Counter[int] = Counter()
    for line in text.split("\n"):
        words = line.split()
        counts = {int(word[1 : word.index("=")]): _value(word) for word in words if _is_node(word)}
        if any(word.startswith("file=") for word in words):
            own = next((_value(word) for word in words if word.startswith("anon=")), 0)
            # The counts by node are sums of private copies and the file's own pages. If there are both,
            # the copies count if all pages are on one node, and else not at all.
            if own != sum(counts.values()):
                counts = dict.fromkeys(counts, own) if len(counts) == 1 else {}
        # Transparent huge pages are counted in 4 KiB pages; only hugetlbfs pages have another size.
        size = next((_value(word) for word in words if word.startswith("kernelpagesize_kB=")), 4)
        for node, count in counts.items():
            by_node[node] += count * size * 1024
    return {node: size for node, size in sorted(by_node.items()) if size}


def parse_private_maps(text: str) -> list[tuple[int, int]]:
    """The first address, and the one past the end, of each writable private mapping without a file."""
    found = []
    for line in filter(None, text.split("\n")):
        addresses, mode, _offset, _device, inode, *name = line.split(maxsplit=5)
        special = bool(name) and name[0].startswith("[v")  # [vdso], [vvar], [vsyscall]
        if mode.startswith("rw") and mode.endswith("p") and inode == "0" and not special:
            first, last = addresses.split("-")
            found.append((int(first, 16), int(last, 16)))
    return found


def count_samples(samples: Iterable[tuple[int, int]]) -> dict[int, int]:
    """(bytes that a sample stands for, node or negative error) -> bytes per node. A page that was
    never touched has an error and is not counted."""
    by_node: Counter[int] = Counter()
    for size, node in samples:
        if node >= 0:
            by_node[node] += size
    return dict(sorted(by_node.items()))


def parse_thread(status: str, stat: str) -> Thread:
    """Parse the texts of a thread's status and stat files."""
    fields = dict(line.split(":\t", 1) for line in status.split("\n") if ":\t" in line)
    # In stat the name is in parentheses, and may contain some; field 3 follows the last one.
    last_cpu = int(stat.rpartition(")")[2].split()[39 - 3])
    return Thread(fields["Name"], parse_cpu_list(fields["Cpus_allowed_list"]), last_cpu)


def stray_threads(threads: Mapping[int, Thread], cpus: Collection[int]) -> tuple[str, ...]:
    """A description of each thread (by its id) that may run outside `cpus`."""
    said = []
    for number, thread in sorted(threads.items()):
        if not set(thread.mask) <= set(cpus):
            text = f"thread {number} ({thread.name}) may run on cpus {format_cpu_list(thread.mask)}"
            text += f", outside {format_cpu_list(cpus)}"
            ran_there = thread.last_cpu not in cpus
            said.append(f"{text}, and last ran on {thread.last_cpu}" if ran_there else text)
    return tuple(said)


def _is_node(word: str) -> bool:
    return re.fullmatch(r"N\d+=\d+", word) is not None


def _value(word: str) -> int:
    return int(word[word.index("=") + 1 :])


def _read_pages(root: Path) -> tuple[dict[int, int], str]:
    with suppress(OSError):
        # File names may contain any bytes.
        return parse_numa_maps(_text(root / "numa_maps")), "numa_maps"
    with suppress(OSError):
        ranges = parse_private_maps(_text(root / "maps"))
        pid = int(root.name) if root.name.isdigit() else 0  # 0: the calling process
        return count_samples(_sample(pid, ranges)), "move_pages"
    return {}, ""


def _sample(pid: int, ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(bytes, node) of evenly spread addresses. Raises OSError if the kernel does not report nodes."""
    number = _MOVE_PAGES.get(platform.machine())
    if number is None:
        raise OSError(f"no move_pages on {platform.machine()}")
    page = os.sysconf("SC_PAGE_SIZE")
    total = sum(last - first for first, last in ranges)
    stride = max(1, -(-total // (_NUM_SAMPLES * page))) * page
    addresses = [
        (at, min(stride, last - at)) for first, last in ranges for at in range(first, last, stride)
    ]
    pages = (ctypes.c_void_p * len(addresses))(*(at for at, _ in addresses))
    status = (ctypes.c_int * len(addresses))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, pid, ctypes.c_ulong(len(addresses)), pages, None, status, 0) != 0:
        raise OSError(ctypes.get_errno(), "move_pages")
    return ((size, node) for (_, size), node in zip(addresses, status, strict=True))


def _read_threads(folder: Path, cpus: Collection[int]) -> tuple[tuple[str, ...], int]:
    threads: dict[int, Thread] = {}
    for task in folder.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # threads come and go
            threads[int(task.name)] = parse_thread(
                _text(task / "status"),
                _text(task / "stat"),
            )
    return stray_threads(threads, cpus), len(threads)


def _render_pages(placement: Placement) -> str:
    if not placement.source:
        return "the nodes of its pages are unknown (numa_maps and move_pages do not work here)"
    percent = 100 * placement.local_bytes / max(placement.total_bytes, 1)
    nodes = f"{'node' if len(placement.nodes) == 1 else 'nodes'} {format_cpu_list(placement.nodes)}"
    away = "".join(
        f", {_size(size)} on node {node}"
        for node, size in placement.pages_by_node.items()
        if node not in placement.nodes
    )
    return f"{percent:.1f} % of {_size(placement.total_bytes)} on {nodes}{away} ({placement.source})"


def _render_threads(placement: Placement) -> str:
    count = "1 thread" if placement.num_threads == 1 else f"{placement.num_threads} threads"
    strays = placement.stray_threads
    if not strays:
        return f"{count}, all on cpus {format_cpu_list(placement.cpus)}"
    more = len(strays) - _NUM_SHOWN_STRAYS
    shown = "; ".join(strays[:_NUM_SHOWN_STRAYS])
    return f"{count}; {shown}" + (f"; and {more} more" if more > 0 else "")


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
