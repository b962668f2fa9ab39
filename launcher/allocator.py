"""How the C library hands out a rank's memory: in huge pages, and without giving it back in between.

Activations are tensors of MiB, which glibc takes from the kernel anew and gives back: a prompt then
spends a tenth of its time on page faults. Weights are read faster from huge pages. glibc reads these
settings as a process starts, so the launcher has to put them into the rank's environment. Source: the
glibc manual, Memory Allocation Tunables.

What is not here: ranks that torchrun, srun or mpirun started; other C libraries, which look at none of
this.
"""

from __future__ import annotations

from collections.abc import Mapping

_MIB = 1 << 20
# `hugetlb=1` asks for transparent huge pages (glibc 2.35), which the kernel gives where it may.
# 32 MiB is the most that `mmap_threshold` may be; larger tensors are mapped on their own.
_WANTED = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": 32 * _MIB,
    "glibc.malloc.trim_threshold": 1024 * _MIB,
    "glibc.malloc.top_pad": 64 * _MIB,
}


def allocator_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variable to set for a rank; what the user has set in it stays and comes first."""
    given = [part for part in environ.get("GLIBC_TUNABLES", "").split(":") if part]
    names = {part.split("=")[0] for part in given}
    ours = [f"{name}={value}" for name, value in _WANTED.items() if name not in names]
    return {"GLIBC_TUNABLES": ":".join([*given, *ours])}
