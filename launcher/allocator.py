"""Settings of the C library's allocator for a rank: use huge pages, and keep freed memory.

Activations are tensors of several MiB. By default glibc maps each anew from the kernel and unmaps it
when freed; prefill then spends a tenth of its time on page faults. Weights are read faster from huge
pages. glibc reads these settings at process start, so the launcher sets them in the rank's environment.
Source: the glibc manual, Memory Allocation Tunables.

What is not here: ranks that torchrun, srun or mpirun started; other C libraries, which ignore these
settings.
"""

from __future__ import annotations

from collections.abc import Mapping

_MIB = 1 << 20
# `hugetlb=1` asks for transparent huge pages (glibc 2.35); the kernel may refuse.
# 32 MiB is the maximum of `mmap_threshold`; larger tensors are still mapped individually.
_WANTED = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": 32 * _MIB,
    "glibc.malloc.trim_threshold": 1024 * _MIB,
    "glibc.malloc.top_pad": 64 * _MIB,
}


def allocator_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """GLIBC_TUNABLES for a rank; what the user has set in it is kept and comes first."""
    given = [part for part in environ.get("GLIBC_TUNABLES", "").split(":") if part]
    names = {part.split("=")[0] for part in given}
    ours = [f"{name}={value}" for name, value in _WANTED.items() if name not in names]
    return {"GLIBC_TUNABLES": ":".join([*given, *ours])}
