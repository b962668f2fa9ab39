"""Bind this process to its cores and memory, before torch is imported.

The order matters: the OpenMP runtime counts its cores and starts its threads as torch is loaded, and
memory stays on the node where it was first touched. System calls are made directly, so that neither
numactl nor libnuma needs to be installed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import MutableMapping

from launcher.plan import RankPlan

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # system call numbers
_MPOL_PREFERRED, _MPOL_BIND = 1, 2  # linux/mempolicy.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def bind_this_process(
    plan: RankPlan, bind_cores: bool, environ: MutableMapping[str, str]
) -> tuple[str, ...]:
    """Apply the plan to this process and what it starts; returns notes on what could not be done."""
    assert "torch" not in sys.modules, "binding after torch is loaded comes too late"
    notes = []
    kept = environ.get("OMP_NUM_THREADS")
    if kept is None:
        environ["OMP_NUM_THREADS"] = str(plan.num_threads)
    elif kept != str(plan.num_threads):
        notes.append(f"OMP_NUM_THREADS={kept} is kept as set; the plan has {plan.num_threads}")
    if bind_cores:
        os.sched_setaffinity(0, plan.cpus)
        if plan.memory_policy == "bind":
            notes.extend(_bind_memory(plan.nodes))
    return tuple(notes)


def _bind_memory(nodes: tuple[int, ...]) -> list[str]:
    """Strictly bind; where a container forbids it, prefer; else leave it to first touch."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return [f"no memory policy on {platform.machine()}: pages go where they are first touched"]
    libc = ctypes.CDLL(None, use_errno=True)
    mask = sum(1 << node for node in nodes)
    words = max(nodes) // 64 + 1
    bits = (ctypes.c_uint64 * words)(*(mask >> 64 * i & (1 << 64) - 1 for i in range(words)))
    # The kernel reads one bit less than it is told.
    size = ctypes.c_ulong(64 * words + 1)
    if libc.syscall(number, _MPOL_BIND, bits, size) == 0:
        return []
    reason = os.strerror(ctypes.get_errno())
    if libc.syscall(number, _MPOL_PREFERRED, bits, size) == 0:
        return [f"memory is preferred on nodes {nodes}, not bound ({reason})"]
    return [f"memory cannot be bound ({reason}): pages go where they are first touched"]


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the launcher dies, even of SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the call above
        os._exit(1)
