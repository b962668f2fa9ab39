"""The allocator's settings: they reach a rank, and leave what the user has set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from launcher.allocator import allocator_variables


def test_what_the_user_has_set_stays() -> None:
    given = "glibc.malloc.hugetlb=0:glibc.malloc.check=3"
    parts = allocator_variables({"GLIBC_TUNABLES": given})["GLIBC_TUNABLES"].split(":")
    assert ":".join(parts[:2]) == given
    assert sum(part.startswith("glibc.malloc.hugetlb=") for part in parts) == 1
    assert len({part.split("=")[0] for part in parts}) == len(parts) == 5


ALLOCATE = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def once():
    place = libc.malloc(24 << 20)
    ctypes.memset(place, 1, 24 << 20)
    libc.free(place)
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    other = libc.malloc(8 << 20)
    once()
    libc.free(other)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are settings of glibc's")
def test_memory_is_kept_for_the_next_tensor() -> None:
    """Ten times 24 MiB of 4 KiB pages would be 61440 faults; kept, they are 2048 for the other tensor,
    and with huge pages next to none."""
    environ = {**os.environ, **allocator_variables({})}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE], env=environ, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4096
