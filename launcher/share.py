"""Leave the cores of other runs alone, where the request allows it. The functions are pure.

`launcher.claims` knows which cores other runs of this user are bound to. With --share a run gets the
cores that are left. With --ranks it also gets only the sockets (or what --rank-per names) that are
entirely free, if there are enough of them. Otherwise it gets what it would have got without them, and
`overlaps` says with whom it shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from base.errors import LaunchError
from launcher.divide import group_cores, join_shared
from launcher.machine.topology import Core, format_cpu_list


@dataclass(frozen=True)
class Claim:
    """The cpus to which the run of the launcher `pid` is bound."""

    pid: int
    cpus: tuple[int, ...]


def left_cores(
    cores: tuple[Core, ...], claims: Sequence[Claim], reasons: list[str]
) -> tuple[Core, ...]:
    """The cores of which no run has a hardware thread. Raises LaunchError if none is left."""
    left = tuple(core for core in cores if not _is_claimed(core, claims))
    if not left:
        raise LaunchError(f"--share: no core is left; {_names(claims)}")
    if len(left) < len(cores):
        reasons.append(f"{_names(claims)}: the ranks get what is left (--share)")
    return left


def free_units(
    cores: tuple[Core, ...],
    claims: Sequence[Claim],
    ranks: int,
    rank_per: str | None,
    reasons: list[str],
) -> tuple[Core, ...]:
    """The cores of the sockets (or what `rank_per` names) that are free, if other runs have cores and
    there is a free one for each rank; else `cores`. As many as the ranks divide evenly."""
    if not any(_is_claimed(core, claims) for core in cores):
        return cores
    units = group_cores(cores, rank_per or "socket", [])
    if rank_per is None:
        units = join_shared(units, [])
    free = [unit for _, unit in units if not any(_is_claimed(core, claims) for core in unit)]
    if len(free) < ranks:
        return cores
    reasons.append(f"{_names(claims)}: the ranks get {rank_per or 'socket'}s that are free")
    return tuple(core for unit in free[: len(free) // ranks * ranks] for core in unit)


def overlaps(cores: Iterable[Core], cpus: Iterable[int], claims: Sequence[Claim]) -> list[str]:
    """A sentence for each other run that has a core of these cpus too."""
    wanted = set(cpus)
    own = [core for core in cores if wanted & set(core.cpus)]
    found = []
    for claim in claims:
        both = {cpu for core in own if _is_claimed(core, [claim]) for cpu in core.cpus if cpu in wanted}
        if both:
            found.append(
                f"cpus {format_cpu_list(both)} are bound to another run too (pid {claim.pid}), which "
                "slows both; --share takes the cores that are left"
            )
    return found


def _is_claimed(core: Core, claims: Iterable[Claim]) -> bool:
    return any(set(core.cpus) & set(claim.cpus) for claim in claims)


def _names(claims: Sequence[Claim]) -> str:
    return "; ".join(f"pid {claim.pid} has cpus {format_cpu_list(claim.cpus)}" for claim in claims)
