"""Run this process as one of the ranks that torchrun, srun or mpirun has started.

The manager says which rank this is. The plan of this machine says where that rank runs. Every local
rank makes the same plan and takes its own entry of it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

from base.errors import LaunchError
from base.streams import say
from launcher.child import PROGRAM, RankEnv, run_managed
from launcher.machine.topology import format_cpu_list, read_topology
from launcher.manager import Managed, interface_of
from launcher.meeting import meet
from launcher.plan import LaunchPlan, LaunchRequest, plan_launch
from launcher.shared_secret import shared_secret
from launcher.spawn import RunOptions, rank_variables


def local_plan(place: Managed, request: LaunchRequest) -> LaunchPlan:
    """The plan of this machine's ranks, with their ranks in the whole run. Raises LaunchError."""
    if request.ranks not in (None, place.local_world_size):
        raise LaunchError(
            f"--ranks {request.ranks}, but {place.manager} started {place.local_world_size} ranks on "
            "this machine: leave --ranks out"
        )
    note, alone = _settle_mask(place, request.binds)
    count = 1 if alone else place.local_world_size
    topology = read_topology(Path("/"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    plan = plan_launch(topology, replace(request, ranks=count))
    first = place.rank - place.local_rank
    lines = [plan.ranks[0]] * place.local_world_size if alone else list(plan.ranks)
    backend = plan.backend
    if backend == "shm" and place.world_size > place.local_world_size:
        backend = "shm+gloo"  # shared memory within a machine, gloo between machines
    return replace(
        plan,
        ranks=tuple(replace(line, rank=first + i) for i, line in enumerate(lines)),
        backend=backend,
        reasons=plan.reasons + ((note,) if note else ()),
    )


def _settle_mask(place: Managed, binds: bool) -> tuple[str, bool]:
    """What the manager did to the affinity mask: a note, and whether the mask is for this rank alone.

    If the mask differs from the parent's, the manager narrowed it for this rank. Slurm's mask is
    kept: it holds the cpus that Slurm granted. mpirun narrows to a single core by default. If the user
    asked Yoke to bind, that mask is replaced by the parent's, and the plan uses all its cpus.
    """
    own, parents = os.sched_getaffinity(0), os.sched_getaffinity(os.getppid())
    if own == parents:
        return "", False
    if place.manager == "srun" or not binds:
        return f"{place.manager} gave this rank the cpus {format_cpu_list(own)}", True
    os.sched_setaffinity(0, parents)
    return (
        f"{place.manager} had bound this rank to cpus {format_cpu_list(own)}; the plan replaces that",
        False,
    )


def join(
    place: Managed,
    plan: LaunchPlan,
    options: RunOptions,
    target: str,
    payload: str,
) -> int:
    """Run `target` as this rank and return its exit code."""
    if place.manager == "torchrun" and not _set_by_user("OMP_NUM_THREADS"):
        os.environ.pop("OMP_NUM_THREADS", None)  # torchrun's default of 1; the plan sets its own
    several = place.world_size > place.local_world_size
    # The user's program sets up its own communication.
    secret = shared_secret(options.secret_file, os.environ) if several and target != PROGRAM else ""
    try:
        meeting = meet(place, options.start_timeout_s or 300.0)
    except LaunchError as error:  # each rank misses different ranks, so each prints its own error
        say(f"error: {error}")
        return error.exit_code
    env = RankEnv(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        session=meeting.session,
        run=place.run,
        backend=plan.backend,
        master_addr=place.master_addr,
        master_port=meeting.port,
        comm_timeout_s=options.comm_timeout_s,
        start_timeout_s=options.start_timeout_s,
        plan=plan.ranks[place.local_rank],
        plans=[asdict(rank) for rank in plan.ranks],
        bind_cores=plan.bind_cores,
        node=place.node,
        secret=secret,
        store_fd=None if meeting.store is None else meeting.store.detach(),
        agent_store=place.agent_store,
        verify_placement=options.verify_placement,
    )
    if several:
        name = interface_of(place.master_addr)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if target != PROGRAM:
        os.environ["PYTHONSAFEPATH"] = "1"  # as for ranks that our own launcher starts
    for key, value in rank_variables(env).items():
        os.environ.setdefault(key, value)
    return run_managed(env, target, payload, options.tracebacks)


def _set_by_user(name: str) -> bool:
    """Whether the parent process was itself started with the variable (not only its children)."""
    try:
        initial = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return any(entry.startswith(name.encode() + b"=") for entry in initial.split(b"\0"))
