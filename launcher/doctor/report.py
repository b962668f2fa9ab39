"""`doctor`: report on this machine, what Yoke will use on it, and what to change.

Each fact is probed separately, and no failure ends the report: failed probes are listed. The command
changes nothing and stores nothing. A separate process probes torch, and the optional packages are
checked by their metadata, so the launcher imports neither.

As JSON (sizes in bytes; null for "no limit" or "unknown"):

    machine   {model, arch, sockets, nodes: [{id, memory_bytes, kind, cpus}], cores, threads,
               kinds: {name: cores}, gpus: [{index, pci, node}], notes: [str]}
    limits    {shm_bytes, shm_free_bytes, memlock_bytes, memory_limit_bytes, memory_used_bytes,
               cpu_quota, open_files, shm_writable: bool, memory_policy: bool, memory_policy_refusal}
    kernel    {numa_balancing: bool, huge_pages, swap_used_bytes, governors: {name: [cpu]}}
    compiler  {path, version, works, error, python_headers}
    torch     null, or {version, openmp: [file name], num_threads, cpu_capability, mkl, onednn, cuda,
               cuda_devices: [{name, memory_bytes, capability}], nccl, extension,
               segment_bytes_per_rank, failed: [str]}
    cpu       {avx2, avx512, bf16, vnni, amx, asimd, i8mm, sve}
    backends  [{name, found, version, fits, note}]
    will_use  {ranks: [{rank, device, nodes, cpus, num_threads, ...}], transport, transport_why,
               compute}
    placement [{rank, local_bytes, total_bytes, source, stray_threads, num_threads, ...}]: from a
               short trial with bound ranks; [] for a recorded machine
    to_change [{problem, action, stops}]; `stops`: Yoke cannot run until it is changed
    not_told  [str]

What is not here: speed. Nothing is measured.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from base.streams import show, show_json, writing
from launcher.doctor.backends import Backend, find_backends, release
from launcher.doctor.probe import (
    Compiler,
    Kernel,
    Limits,
    finish_torch_probe,
    read_cpu,
    read_kernel,
    read_limits,
    start_torch_probe,
    try_compiler,
    try_memory_policy,
)
from launcher.doctor.selfcheck import try_placement
from launcher.machine.topology import Topology, format_cpu_list
from launcher.placement import Placement
from launcher.plan import LaunchRequest, RankPlan, plan_launch

OLDEST_TORCH = (2, 11)
INSTRUCTIONS = ("avx2", "avx512", "bf16", "vnni", "amx", "asimd", "i8mm", "sve")
_T = TypeVar("_T")
_USUAL = LaunchRequest(bind_cores=True)


@dataclass(frozen=True)
class Change:
    """A problem and the command that solves it. `stops`: Yoke cannot run until it is solved."""

    problem: str
    action: str
    stops: bool = False


@dataclass(frozen=True)
class Facts:
    """What the probes found; None where one failed. `memory_refusal` "": memory can be bound."""

    ranks: tuple[RankPlan, ...]
    backend: str
    limits: Limits | None
    kernel: Kernel | None
    compiler: Compiler | None
    memory_refusal: str | None
    torch: dict[str, Any] | None
    torch_error: str | None
    placements: tuple[Placement, ...] = ()


def doctor(
    topology: Topology,
    as_json: bool,
    checkout: Path,
    request: LaunchRequest = _USUAL,
    here: bool = True,
) -> int:
    """Print the report and return the exit code: 1 if something stops Yoke from running, else 0.
    `here`: the topology is this machine's, so ranks can be started for a trial."""
    report = examine(topology, checkout, request=request, here=here)
    if as_json:
        show_json(report)
    elif sys.stdout.isatty():
        from launcher.doctor.view import draw

        with writing():
            draw(report)
    else:
        from launcher.doctor.view import render

        show(render(report))
    return int(any(change["stops"] for change in report["to_change"]))


def examine(
    topology: Topology,
    checkout: Path,
    root: Path = Path("/"),
    request: LaunchRequest = _USUAL,
    here: bool = True,
) -> dict[str, Any]:
    """The report, as the module's docstring describes it."""
    failures: list[str] = []

    def attempt(what: str, probe: Callable[[], _T]) -> _T | None:
        try:
            return probe()
        except Exception as error:  # any failure: the other facts are still reported
            failures.append(f"{what}: {type(error).__name__}: {error}")
            return None

    torch_process = attempt("torch", lambda: start_torch_probe(checkout))  # runs in parallel
    plan = attempt("plan", lambda: plan_launch(topology, request))
    placements: tuple[Placement, ...] = ()
    if plan is not None and here:
        placements = attempt("placement", lambda: try_placement(plan)) or ()
    limits = attempt("limits", lambda: read_limits(root))
    kernel = attempt("kernel settings", lambda: read_kernel(topology.allowed_cpus, root))
    cpu = attempt("processor", lambda: read_cpu(root)) or {}
    compiler = attempt("compiler", try_compiler)
    nodes = [node.id for node in topology.nodes if node.memory_bytes]
    refusal = attempt("memory policy", lambda: try_memory_policy(nodes, checkout))
    torch, torch_error = None, "its probe did not start"
    if torch_process is not None:
        try:
            torch, torch_error = finish_torch_probe(torch_process), ""
            failures.extend(torch["failed"])
        except Exception as error:
            torch_error = str(error)
    facts = Facts(
        ranks=plan.ranks if plan else (),
        backend=plan.backend if plan else "none",
        limits=limits,
        kernel=kernel,
        compiler=compiler,
        memory_refusal=refusal,
        torch=torch,
        torch_error=torch_error or None,
        placements=placements,
    )
    torch_version = torch["version"] if torch else None
    backends = attempt("optional packages", lambda: find_backends(torch_version)) or ()
    return _report(topology, facts, cpu, backends, failures)


def _report(
    topology: Topology,
    facts: Facts,
    cpu: dict[str, Any],
    backends: Sequence[Backend],
    failures: list[str],
) -> dict[str, Any]:
    limits, kernel, compiler = facts.limits, facts.kernel, facts.compiler
    refusal = facts.memory_refusal
    return {
        "machine": _machine(topology, cpu),
        "limits": {
            **(asdict(limits) if limits else {}),
            "memory_policy": None if refusal is None else not refusal,
            "memory_policy_refusal": refusal or None,
        },
        "kernel": asdict(kernel) if kernel else {},
        "compiler": asdict(compiler) if compiler else {},
        "torch": facts.torch,
        "cpu": {name: cpu.get(name) for name in INSTRUCTIONS},
        "backends": [asdict(backend) for backend in backends],
        "will_use": will_use(facts, cpu),
        "placement": [asdict(placement) for placement in facts.placements],
        "to_change": [asdict(change) for change in to_change(topology, facts)],
        "not_told": failures,
    }


def will_use(facts: Facts, cpu: dict[str, Any]) -> dict[str, Any]:
    """What a run here uses with no other flag than --bind-cores-to-rank."""
    transport = facts.backend if len(facts.ranks) > 1 else "none"
    why = {
        "none": "a single rank needs no transport",
        "shm": "Yoke's own collectives in shared memory",
        "gloo": "torch's collectives over sockets",
        "nccl": "NVIDIA's collectives between GPUs",
        "ccl": "oneCCL's collectives",
        "deepspeed": "all-reduce by DeepSpeed's operator, the rest over gloo",
    }[transport]
    if transport == "shm" and not (facts.torch and facts.torch["extension"]):
        why += ", compiled at the first run"
        if not (facts.compiler and facts.compiler.works):
            transport, why = "gloo", "the shared-memory operators cannot be built without a compiler"
    parts = ["torch.compile"]
    if facts.torch and facts.torch["onednn"]:
        parts.append("oneDNN")
    parts.extend(name.upper() for name in ("amx", "avx512", "sve") if cpu.get(name))
    return {
        "ranks": [asdict(rank) for rank in facts.ranks],
        "transport": transport,
        "transport_why": why,
        "compute": ", ".join(parts),
    }


def to_change(topology: Topology, facts: Facts) -> tuple[Change, ...]:
    """The problems found; those that stop Yoke from running come first. Pure."""
    changes = [
        *_torch_changes(facts),
        *_limit_changes(topology, facts),
        *_kernel_changes(topology, facts),
        *_placement_changes(facts),
    ]
    return tuple(sorted(changes, key=lambda change: not change.stops))


def _torch_changes(facts: Facts) -> list[Change]:
    changes = []
    oldest = ".".join(map(str, OLDEST_TORCH))
    install = f"pip install 'torch>={oldest}' (or: make setup)"
    if facts.torch is None:
        changes.append(Change(f"torch cannot be used: {facts.torch_error}", install, stops=True))
    else:
        version, runtimes = facts.torch["version"], facts.torch["openmp"]
        if release(version) < OLDEST_TORCH:
            changes.append(Change(f"torch {version} is older than {oldest}", install, stops=True))
        if runtimes and len(runtimes) > 1:
            problem = f"{len(runtimes)} OpenMP runtimes in one process: {', '.join(runtimes)}"
            changes.append(Change(problem, "unset LD_PRELOAD: each runtime starts its own threads"))
    if facts.compiler and not facts.compiler.works:
        problem = f"no working C++ compiler ({facts.compiler.error}): only gloo and compile=false work"
        changes.append(Change(problem, "apt-get install g++, or set CXX"))
    if facts.compiler and not facts.compiler.python_headers:
        problem = "torch.compile needs Python's C headers"
        changes.append(Change(problem, "apt-get install python3-dev"))
    return changes


def _limit_changes(topology: Topology, facts: Facts) -> list[Change]:
    changes = []
    if facts.memory_refusal and len(topology.nodes) > 1:
        problem = f"memory cannot be bound to nodes ({facts.memory_refusal})"
        action = "docker run --cap-add=SYS_NICE (or a seccomp profile that allows set_mempolicy)"
        changes.append(Change(problem, action))
    if facts.limits is None:
        return changes
    ranks = len(facts.ranks)
    cores = len({cpu for rank in facts.ranks for cpu in rank.cpus})
    quota = facts.limits.cpu_quota
    if quota is not None and quota < cores:
        problem = (
            f"the cgroup's quota is {quota:g} cpus for {cores} cores: bound threads will be throttled"
        )
        action = (
            f"docker run --cpus={cores} (systemd: CPUQuota={100 * cores}%), or taskset to fewer cores"
        )
        changes.append(Change(problem, action))
    if ranks > 1 and facts.limits.shm_free_bytes is None:
        changes.append(Change("there is no /dev/shm", "mount -t tmpfs tmpfs /dev/shm, or --comm gloo"))
    elif ranks > 1 and facts.limits.shm_writable is False:
        action = "mount -o remount,rw,mode=1777 /dev/shm, or --comm gloo"
        changes.append(Change("/dev/shm cannot be written to", action))
    elif ranks > 1 and facts.torch and facts.torch["segment_bytes_per_rank"]:
        needed = ranks * facts.torch["segment_bytes_per_rank"]
        if (facts.limits.shm_free_bytes or 0) < needed:
            free = (facts.limits.shm_free_bytes or 0) / 2**20
            problem = f"/dev/shm has {free:.1f} MiB free; {ranks} ranks need {needed / 2**20:.1f}"
            changes.append(Change(problem, "docker run --shm-size=1g, or remount: -o remount,size=1g"))
    return changes


def _kernel_changes(topology: Topology, facts: Facts) -> list[Change]:
    kernel = facts.kernel
    if kernel is None:
        return []
    changes = []
    if kernel.numa_balancing and len(topology.nodes) > 1:
        problem = "automatic NUMA balancing scans and moves pages that are already bound"
        changes.append(Change(problem, "sysctl kernel.numa_balancing=0"))
    if kernel.huge_pages == "never":
        problem = "transparent huge pages are off: reading weights misses the TLB more often"
        changes.append(
            Change(problem, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled")
        )
    if kernel.swap_used_bytes:
        problem = f"{kernel.swap_used_bytes / 2**30:.1f} GiB of swap are in use: weights may be swapped"
        changes.append(Change(problem, "sysctl vm.swappiness=1, or swapoff -a once memory is free"))
    slow = kernel.governors.get("powersave", ())
    if slow:
        problem = f"cpus {format_cpu_list(slow)} have the frequency governor powersave"
        changes.append(Change(problem, "cpupower frequency-set -g performance"))
    return changes


def _placement_changes(facts: Facts) -> list[Change]:
    changes = []
    for placement in facts.placements:
        if placement.source and placement.local_bytes < 0.95 * placement.total_bytes:
            share = 100 * placement.local_bytes / placement.total_bytes
            problem = f"only {share:.0f} % of rank {placement.rank}'s pages went to its nodes"
            changes.append(Change(problem, "free memory there, or allow set_mempolicy"))
        if placement.stray_threads:
            problem = f"a thread of rank {placement.rank} is not bound: {placement.stray_threads[0]}"
            changes.append(
                Change(problem, "check LD_PRELOAD and sitecustomize: they may start threads")
            )
    return changes


def _machine(topology: Topology, cpu: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": cpu.get("model"),
        "arch": cpu.get("arch"),
        "sockets": len(topology.sockets),
        "nodes": [
            {
                "id": node.id,
                "memory_bytes": node.memory_bytes,
                "kind": node.kind,
                "cpus": list(node.cpus),
            }
            for node in topology.nodes
        ],
        "cores": len(topology.cores),
        "threads": len(topology.allowed_cpus),
        "kinds": dict(Counter(core.kind for core in topology.cores if core.kind)),
        "gpus": [{"index": gpu.index, "pci": gpu.pci, "node": gpu.node} for gpu in topology.gpus],
        "notes": list(topology.notes),
    }
