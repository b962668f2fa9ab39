"""Check whether what each rank must hold fits in the memory of its place. The functions are pure,
except `require_space` and `require_loopback`.

The caller passes what a model needs (`engine.memory` computes it for generation); this module knows
only places. It compares with total memory, not free memory: the kernel evicts page cache, and a
machine that is busy today may be idle tomorrow.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import LaunchError
from base.units import format_bytes
from launcher.machine.topology import Topology
from launcher.plan import LaunchPlan


@dataclass(frozen=True)
class Fit:
    """What one rank needs, by purpose, and what is available to it, in bytes."""

    rank: int
    needs: dict[str, int]
    available_bytes: int

    @property
    def needed_bytes(self) -> int:
        return sum(self.needs.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes


def check_fit(
    topology: Topology,
    plan: LaunchPlan,
    needs: Sequence[Mapping[str, int]],
    limit_bytes: int | None = None,
) -> tuple[Fit, ...]:
    """Divide the memory of each node among the ranks on it, in proportion to what they need.

    `needs` are the bytes of each rank, by purpose; `limit_bytes` is the cgroup's limit for all ranks
    together. A rank whose memory is not bound to its nodes ("none", "preferred") can use other nodes
    too, so it is compared with the whole machine's memory.
    """
    memory = {node.id: node.memory_bytes for node in topology.nodes}
    machine = machine_memory(topology, limit_bytes)
    totals = [sum(need.values()) for need in needs]
    fits = []
    for rank in plan.ranks:
        available = _share(machine, totals[rank.rank], totals)
        if rank.memory_policy in ("bind", "interleave"):
            group = [totals[other.rank] for other in plan.ranks if set(other.nodes) & set(rank.nodes)]
            local = sum(memory.get(node, 0) for node in rank.nodes)
            available = min(available, _share(local, totals[rank.rank], group))
        fits.append(Fit(rank.rank, dict(needs[rank.rank]), available))
    return tuple(fits)


def machine_memory(topology: Topology, limit_bytes: int | None = None) -> int:
    """Bytes available to all ranks together; 0 if the nodes do not report their size."""
    memory = sum(n.memory_bytes for n in topology.nodes if n.id in topology.allowed_nodes)
    return memory if limit_bytes is None else min(memory, limit_bytes)


def _share(total: int, need: int, needs: Sequence[int]) -> int:
    return total * need // max(sum(needs), 1)


def require_fit(fits: Sequence[Fit]) -> None:
    """Raise LaunchError if a rank does not fit: it names the first such rank, and what to do."""
    for fit in fits:
        if not fit.fits:
            parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in fit.needs.items())
            raise LaunchError(
                f"rank {fit.rank} needs {format_bytes(fit.needed_bytes)} ({parts}), and its place has "
                f"{format_bytes(fit.available_bytes)}; use more ranks with more memory, a smaller "
                "max_seq_len or dtype=bfloat16 (python launch.py plan model=... shows the sizes)"
            )


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise LaunchError unless `folder` is writable and has `needed_bytes` free."""
    try:
        space = os.statvfs(folder)
    except OSError as error:
        advice = "mount a tmpfs there, or use --comm gloo"
        raise LaunchError(f"{folder}: {error.strerror}; {advice}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(
            f"{folder} cannot be written to, and the ranks need it for shared memory: make it writable "
            "for this user (a tmpfs of mode 1777), or use --comm gloo"
        )
    free = space.f_bavail * space.f_frsize
    if free < needed_bytes:
        raise LaunchError(
            f"{folder} has {format_bytes(free)} free, and the ranks need {format_bytes(needed_bytes)}: "
            "free space there, give the container more (docker run --shm-size=1g), or use --comm gloo"
        )


def require_loopback() -> None:
    """Raise LaunchError unless processes of this machine can connect to each other at 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise LaunchError(
            f"ranks cannot connect at 127.0.0.1 ({error.strerror or error}): bring the loopback "
            "interface up (ip link set lo up), or use --comm shm"
        ) from error
