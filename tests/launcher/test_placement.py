"""Figures from made-up proc files of several nodes, and from real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.placement import (
    Placement,
    Thread,
    check_placement,
    count_samples,
    parse_numa_maps,
    parse_private_maps,
    parse_thread,
    render_placement,
    stray_threads,
)

CHECKOUT = Path(__file__).resolve().parent.parent.parent
KIB, MIB = 1024, 2**20
HAVE_NUMA_MAPS = Path("/proc/self/numa_maps").exists()


def test_own_pages_are_summed_by_node() -> None:
    text = """\
564af903a000 bind:0 heap anon=168 dirty=168 active=0 N0=160 N1=8 kernelpagesize_kB=4
7f00fb7fd000 prefer (many):0-1 anon=270 dirty=270 N0=270 kernelpagesize_kB=4
7ffd6de48000 default stack anon=4 dirty=4 N12=4
7f00fbbf8000 default
"""
    assert parse_numa_maps(text) == {0: 430 * 4 * KIB, 1: 32 * KIB, 12: 16 * KIB}


def test_huge_pages_count_with_their_size() -> None:
    text = """\
7f0000000000 bind:1 file=/anon_hugepage\\040(deleted) huge anon=3 dirty=3 N1=3 kernelpagesize_kB=2048
7f1000000000 bind:1 anon=512 dirty=512 N1=512 kernelpagesize_kB=4
7f2000000000 bind:0 file=/anon_hugepage\\040(deleted) huge dirty=2 N0=2 kernelpagesize_kB=1048576
"""
    # The last one has no private copies: it is shared.
    assert parse_numa_maps(text) == {1: 6 * MIB + 2 * MIB}


def test_of_files_only_private_copies_count() -> None:
    library = "7f00fbbed000 default file=/usr/lib/N3=9/libc.so.6"
    assert parse_numa_maps(f"{library} mapped=252 mapmax=6 N0=252 kernelpagesize_kB=4") == {}
    assert parse_numa_maps(f"{library} anon=4 dirty=4 N1=4 kernelpagesize_kB=4") == {1: 16 * KIB}
    mixed = f"{library} anon=4 dirty=4 mapped=10"
    assert parse_numa_maps(f"{mixed} N0=10 kernelpagesize_kB=4") == {0: 16 * KIB}
    assert parse_numa_maps(f"{mixed} N0=7 N1=3 kernelpagesize_kB=4") == {}
    segment = "7f00fb000000 default file=/dev/shm/yoke-1\\040(deleted) dirty=9 N0=9 kernelpagesize_kB=4"
    assert parse_numa_maps(segment) == {}


def test_private_mappings() -> None:
    text = """\
560000000000-560000002000 rw-p 00000000 08:01 1234    /usr/bin/python3.11
560000010000-560000020000 rw-p 00000000 00:00 0       [heap]
7f0000000000-7f0000001000 r--p 00000000 00:00 0
7f0000100000-7f0000300000 rw-p 00000000 00:00 0
7f0000400000-7f0000500000 rw-s 00000000 00:01 99      /dev/zero (deleted)
7ffd00000000-7ffd00010000 rw-p 00000000 00:00 0       [stack]
7ffd00020000-7ffd00030000 rw-p 00000000 00:00 0       [vvar]
"""
    assert parse_private_maps(text) == [
        (0x560000010000, 0x560000020000),
        (0x7F0000100000, 0x7F0000300000),
        (0x7FFD00000000, 0x7FFD00010000),
    ]


def test_names_may_hold_any_character_but_a_line_feed() -> None:
    row = "7f0000000000-7f0000001000 rw-p 00000000 08:01 5 /a\x0cb\u2028c\x1d d\r\n"
    assert parse_private_maps(row * 2) == []
    name = "a\x85b\x0bc\rd"
    status = f"Name:\t{name}\nCpus_allowed_list:\t0-2\n"
    stat = f"5 ({name}) S " + " ".join(map(str, range(4, 53)))
    assert parse_thread(status, stat) == Thread(name, (0, 1, 2), 39)


def test_samples_that_no_node_holds_count_as_nothing() -> None:
    assert count_samples([(8, 1), (8, 0), (4, 1), (8, -2), (8, -14)]) == {0: 8, 1: 12}


def test_a_thread_from_its_files() -> None:
    status = "Name:\ta ) (b\nTgid:\t7\nCpus_allowed:\tff\nCpus_allowed_list:\t0-2,7\n"
    # Each field holds its own number, as proc(5) counts them.
    stat = "1 (a ) (b) S " + " ".join(map(str, range(4, 53)))
    assert parse_thread(status, stat) == Thread("a ) (b", (0, 1, 2, 7), 39)


def test_a_thread_is_a_stray_if_it_may_leave_wherever_it_runs() -> None:
    threads = {
        12: Thread("python", (0, 1), 0),
        13: Thread("a thread) (", (0, 1, 2, 3), 1),
        14: Thread("far", (2, 7), 7),
        15: Thread("narrow", (1,), 1),
    }
    assert stray_threads(threads, (0, 1)) == (
        "thread 13 (a thread) () may run on cpus 0-3, outside 0-1",
        "thread 14 (far) may run on cpus 2,7, outside 0-1, and last ran on 7",
    )


def test_one_line_for_people() -> None:
    placement = Placement(
        rank=3,
        nodes=(1,),
        cpus=(4, 5, 6),
        pages_by_node={0: 3 * MIB, 1: 3 * 2**30 - 3 * MIB},
        local_bytes=3 * 2**30 - 3 * MIB,
        total_bytes=3 * 2**30,
        source="numa_maps",
        stray_threads=(),
        num_threads=4,
    )
    assert render_placement(placement) == (
        "rank 3: 99.9 % of 3.0 GiB on node 1, 3.0 MiB on node 0 (numa_maps); 4 threads, all on cpus 4-6"
    )
    astray = replace(placement, source="", stray_threads=tuple(f"thread {n} strays" for n in range(6)))
    line = render_placement(astray)
    assert "are unknown" in line and "%" not in line
    assert line.endswith("4 threads; " + "; ".join(astray.stray_threads[:4]) + "; and 2 more")


def in_a_process(code: str) -> dict[str, Any]:
    """Run code that sets `placement` in a fresh interpreter, whose pages and threads are known."""
    header = "from launcher.placement import check_placement\nimport os, threading, json\n"
    footer = "\nfrom dataclasses import asdict; print(json.dumps(asdict(placement)))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", header + code + footer],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def nodes_here() -> list[int]:
    folders = Path("/sys/devices/system/node").glob("node[0-9]*")
    return sorted(int(folder.name[4:]) for folder in folders) or [0]


@pytest.mark.skipif(not HAVE_NUMA_MAPS, reason="this kernel has no numa_maps")
def test_the_pages_of_a_real_process() -> None:
    code = f"""
before = check_placement(0, {nodes_here()}, os.sched_getaffinity(0))
ballast = bytearray(b'x') * {64 * MIB}
placement = check_placement(0, {nodes_here()}, os.sched_getaffinity(0))
assert {64 * MIB} <= placement.total_bytes - before.total_bytes < {66 * MIB}, (before, placement)
"""
    placement = in_a_process(code)
    assert placement["source"] == "numa_maps"
    assert placement["local_bytes"] == placement["total_bytes"]
    assert placement["num_threads"] == 1 and placement["stray_threads"] == []


@pytest.mark.skipif(not HAVE_NUMA_MAPS, reason="the samples are compared with numa_maps")
def test_the_samples_agree_with_the_counts(tmp_path: Path) -> None:
    (tmp_path / "maps").symlink_to("/proc/self/maps")
    (tmp_path / "task").symlink_to("/proc/self/task")
    code = f"""
from pathlib import Path
ballast = bytearray(b'x') * {320 * MIB}  # more than is looked at page by page
placement = check_placement(0, {nodes_here()}, os.sched_getaffinity(0), Path({str(tmp_path)!r}))
exact = check_placement(0, {nodes_here()}, os.sched_getaffinity(0))
assert exact.source == "numa_maps"
assert abs(placement.total_bytes - exact.total_bytes) < 0.03 * exact.total_bytes, (placement, exact)
"""
    assert in_a_process(code)["source"] == "move_pages"


def test_where_nothing_answers_nothing_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "task").symlink_to("/proc/self/task")
    placement = check_placement(0, [0], os.sched_getaffinity(0), tmp_path)
    assert (placement.source, placement.pages_by_node, placement.total_bytes) == ("", {}, 0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cpus")
def test_a_real_thread_that_strays_is_named() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    code = f"""
os.sched_setaffinity(0, [{first}])
ready, done = threading.Event(), threading.Event()
def stray():
    os.sched_setaffinity(0, [{first}, {second}])
    ready.set(); done.wait()
threading.Thread(target=stray).start()
threading.Thread(target=done.wait).start()
ready.wait()
placement = check_placement(0, [0], [{first}])
done.set()
"""
    placement = in_a_process(code)
    assert placement["num_threads"] == 3
    (stray,) = placement["stray_threads"]
    assert f"may run on cpus {first}" in stray and stray.split(", and")[0].endswith(f"outside {first}")
