"""Bind this process to its cores and memory, before torch is imported.

The order matters: the OpenMP runtime counts the cores and places its threads when torch is loaded, and
memory stays on the node where it was first touched. System calls are made directly, so neither numactl
nor libnuma is needed. Variables that the user has set in the environment are kept.

What is not here: checking afterwards where pages and threads are (`launcher.placement`).
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import platform
import signal
import sys
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

from base.errors import LaunchError
from launcher.machine.topology import format_cpu_list
from launcher.plan import RankPlan

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # system call numbers
# From linux/mempolicy.h; PREFERRED_MANY needs Linux 5.15.
_MPOL = {"preferred": 1, "bind": 2, "interleave": 3, "preferred-many": 5}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_AFFINITY_VARIABLES = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def bind_this_process(
    plan: RankPlan, bind_cores: bool, environ: MutableMapping[str, str]
) -> tuple[str, ...]:
    """Apply the plan to this process and its future children; return notes on what could not be done.

    Raises LaunchError if the kernel refuses the cpus of the plan.
    """
    assert "torch" not in sys.modules, "binding after torch is loaded comes too late"
    values, notes = thread_environment(plan, bind_cores, openmp_runtime(environ), environ)
    environ.update(values)
    if plan.device != "cpu":
        environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order that the plan uses
    if not bind_cores:
        return notes
    try:
        os.sched_setaffinity(0, plan.cpus)
    except OSError as error:
        raise LaunchError(
            f"rank {plan.rank} cannot be bound to cpus {format_cpu_list(plan.cpus)} "
            f"({error.strerror}); python launch.py plan shows the allowed cpus"
        ) from error
    return notes + place_memory(plan)


def openmp_runtime(environ: Mapping[str, str]) -> str:
    """The OpenMP runtime that torch will load: "gomp" (GNU), "iomp" (Intel, LLVM), or "".

    Found from the names of the libraries in torch's folder, without importing torch; a preloaded
    library (LD_PRELOAD) takes precedence.
    """
    preloaded = environ.get("LD_PRELOAD", "")
    names = [Path(part).name for part in preloaded.replace(":", " ").split()]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        for folder in (package / "lib", package.parent / "torch.libs"):
            names += sorted(file.name for file in folder.glob("lib*omp*"))
    for name in names:
        if name.startswith(("libiomp5", "libomp")):
            return "iomp"
        if name.startswith("libgomp"):
            return "gomp"
    return ""


def thread_environment(
    plan: RankPlan, bind_cores: bool, runtime: str, environ: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The OpenMP variables to set for a rank, and notes on those that the user has set.

    Each cpu of the rank gets one thread. GNU's runtime reads OMP_PLACES and OMP_PROC_BIND when it is
    loaded; Intel's and LLVM's read KMP_AFFINITY.
    """
    values, notes = {}, []
    kept = environ.get("OMP_NUM_THREADS")
    if kept is None:
        values["OMP_NUM_THREADS"] = str(plan.num_threads)
    elif kept != str(plan.num_threads):
        notes.append(f"OMP_NUM_THREADS={kept} is kept as set; the plan would use {plan.num_threads}")
    if not bind_cores:
        return values, tuple(notes)
    already = [f"{name}={environ[name]}" for name in _AFFINITY_VARIABLES if name in environ]
    if already:
        notes.append(f"{', '.join(already)} is kept as set: Yoke does not place threads")
    elif runtime == "iomp":
        listed = ",".join(map(str, plan.cpus))
        values["KMP_AFFINITY"] = f"granularity=fine,proclist=[{listed}],explicit"
    elif runtime == "gomp":
        values["OMP_PLACES"] = ",".join(f"{{{cpu}}}" for cpu in plan.cpus)
        values["OMP_PROC_BIND"] = "close"
    return values, tuple(notes)


def place_memory(plan: RankPlan) -> tuple[str, ...]:
    """Set the memory policy, or a weaker one if the kernel or a container forbids it; return notes."""
    if plan.memory_policy == "none":
        return ()
    if plan.memory_policy == "preferred":
        wanted = (("preferred-many", plan.preferred_nodes), ("preferred", plan.preferred_nodes[:1]))
    else:
        many = (("preferred-many", plan.nodes),) if len(plan.nodes) > 1 else ()
        wanted = ((plan.memory_policy, plan.nodes), *many, ("preferred", plan.nodes[:1]))
    reason = ""
    for policy, nodes in wanted:
        code = set_mempolicy(policy, nodes)
        if code == 0:
            # For one node, "preferred" is the same as "preferred-many".
            if not reason or len(plan.preferred_nodes) == 1:
                return ()
            listed = format_cpu_list(nodes)
            return (f"memory is only preferred on node {listed}, not {plan.memory_policy} ({reason})",)
        reason = reason or os.strerror(code)
    return (f"memory cannot be placed ({reason}): pages go where they are first touched",)


def set_mempolicy(policy: str, nodes: Collection[int]) -> int:
    """Call set_mempolicy for this thread and what it starts; return 0 or an errno."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    mask = sum(1 << node for node in nodes)
    words = max(nodes) // 64 + 1
    bits = (ctypes.c_uint64 * words)(*(mask >> 64 * i & (1 << 64) - 1 for i in range(words)))
    # The kernel reads one bit less than the given size.
    size = ctypes.c_ulong(64 * words + 1)
    return 0 if libc.syscall(number, _MPOL[policy], bits, size) == 0 else ctypes.get_errno()


def die_with_parent(parent_pid: int, number: int = signal.SIGKILL) -> None:
    """Make the kernel send this process signal `number` when its parent dies, even of SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent_pid:  # the parent died before the call above
        os._exit(1)
