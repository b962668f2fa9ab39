"""Ranks that a manager (torchrun, srun, mpirun) started: read this rank's place from its variables.

The functions are pure, except `interface_of`. What a manager does not set, the ranks agree on in
`launcher.meeting`.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from base.errors import LaunchError


@dataclass(frozen=True)
class Managed:
    """A rank's place as its manager states it. `run_id` is the same for all ranks of a run and differs
    between runs on a machine; `node` differs between the run's machines; `master_port` is 0 until the
    ranks have agreed on one; `agent_store`: torch's elastic agent serves a store at the master address.
    `variables` are the environment variables used, the decisive one first."""

    manager: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    run_id: str
    node: int = 0
    agent_store: bool = False
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def claim(self) -> str:
        """For messages: the place found, the variables that state it, and how to start without them."""
        variables = " ".join(f"{key}={value}" for key, value in self.variables)
        return (
            f"{variables} in the environment says that {self.manager} started this process as rank "
            f"{self.rank} of {self.world_size}; if it did not: env -u {self.variables[0][0]} "
            "python launch.py ..."
        )

    @property
    def is_on_one_machine(self) -> bool:
        """Whether all ranks run on this machine."""
        return self.world_size == self.local_world_size

    @property
    def place_here(self) -> int:
        """This rank's number among the ranks of its machine."""
        return self.rank if self.world_size == self.local_world_size else self.local_rank

    @property
    def rank_here(self) -> str:
        """What messages call the number `place_here`."""
        return "rank" if self.world_size == self.local_world_size else "local rank"

    @property
    def run(self) -> str:
        """A name of the run, the same on all its machines. It is not secret: others can compute it."""
        return hashlib.sha256(f"{os.getuid()} {self.run_id}".encode()).hexdigest()[:16]


# For each manager, the variables of: rank, world size, local rank, local world size, run id.
_MPI = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID", "PMI_FD")),
)  # fmt: skip


@dataclass(frozen=True)
class _Claim:
    """What a manager's `variables` say of this rank, unchecked. `address`: of rank 0, "" if unknown;
    `hint`: how to set it. `node` None: the manager does not number the machines."""

    manager: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    run_id: str
    variables: tuple[str, ...]
    address: str
    hint: str = "MASTER_ADDR=HOST in the environment"
    node: int | None = None


def find_manager(environ: Mapping[str, str], parent_pid: int) -> Managed | None:
    """This rank's place if a manager started it as one of several ranks, else None. Raises LaunchError
    if the variables contradict each other."""
    if "RANK" in environ and "WORLD_SIZE" in environ and "LOCAL_RANK" in environ:
        return _torchrun(environ, parent_pid)
    claim = _mpi(environ, parent_pid) or _srun(environ)
    return None if claim is None else _checked(claim, environ)


def _mpi(environ: Mapping[str, str], parent_pid: int) -> _Claim | None:
    for name, rank, size, local_rank, local_size, ids in _MPI:
        # Slurm's PMI sets some of Hydra's variables; Slurm's own are read below.
        known = rank in environ and size in environ and local_rank in environ
        if known and _number(environ, size) > 1:
            run_id = next((environ[key] for key in ids if key in environ), str(parent_pid))
            return _Claim(
                manager=name,
                rank=_number(environ, rank),
                world_size=_number(environ, size),
                local_rank=_number(environ, local_rank),
                local_world_size=_number(environ, local_size),
                run_id=f"{name} {run_id}",
                variables=(rank, size, local_rank),
                address=environ.get("MASTER_ADDR", ""),
                hint=f"-x MASTER_ADDR=HOST ({name})",
            )
    return None


def _srun(environ: Mapping[str, str]) -> _Claim | None:
    # `srun` sets the variables of a step. A batch script has only those of the job, and is not a rank.
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    world = _number(environ, "SLURM_STEP_NUM_TASKS")
    if world <= 1:
        return None
    node = _number(environ, "SLURM_NODEID", 0)
    per_node = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    if node >= len(per_node):
        raise LaunchError(
            f"SLURM_NODEID={node} is not a node of SLURM_STEP_TASKS_PER_NODE; start with srun"
        )
    return _Claim(
        manager="srun",
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=per_node[node],
        run_id=f"srun {environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}",
        variables=("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        address=environ.get("MASTER_ADDR", first_host(environ.get("SLURM_STEP_NODELIST", ""))),
        node=node,
    )


def _torchrun(environ: Mapping[str, str], parent_pid: int) -> Managed:
    elastic = "TORCHELASTIC_RUN_ID" in environ
    world = _number(environ, "WORLD_SIZE")
    # Ranks started by hand in two terminals share only the port.
    port = environ.get("MASTER_PORT", "")
    parts = [environ.get("TORCHELASTIC_RUN_ID", "" if port else str(parent_pid)), port]
    parts.append(environ.get("TORCHELASTIC_RESTART_COUNT", ""))
    claim = _Claim(
        manager="torchrun" if elastic else "the environment (RANK, WORLD_SIZE)",
        rank=_number(environ, "RANK"),
        world_size=world,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", world),
        run_id="torchrun " + " ".join(parts),
        variables=("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        address=environ.get("MASTER_ADDR", ""),
    )
    place = _checked(claim, environ)
    agent = elastic and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return replace(
        place,
        agent_store=agent,
        node=_number(environ, "GROUP_RANK", place.node),
        master_addr=environ.get("MASTER_ADDR", place.master_addr) if agent else place.master_addr,
    )


def _checked(claim: _Claim, environ: Mapping[str, str]) -> Managed:
    """The place that is claimed. Raises LaunchError if there is no such place."""
    rank, world_size = claim.rank, claim.world_size
    local_rank, local_world_size = claim.local_rank, claim.local_world_size
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        variables = ", ".join(claim.variables)
        raise LaunchError(
            f"{claim.manager} says rank {rank} of {world_size}, and local rank {local_rank} of "
            f"{local_world_size}: that is impossible; were {variables} set by another run?"
        )
    # Ranks of one machine always meet on the loopback interface, whatever MASTER_ADDR says.
    address = "127.0.0.1" if local_world_size == world_size else claim.address
    port = _number(environ, "MASTER_PORT", 0)
    if local_world_size < world_size and (not address or not port):
        raise LaunchError(
            f"{world_size} ranks on several machines need the address of rank 0: set "
            f"MASTER_PORT=N and {claim.hint}"
        )
    return Managed(
        manager=claim.manager,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=address,
        master_port=port,
        run_id=claim.run_id,
        # Without a number, the first rank of the machine stands for it: ranks are numbered in blocks.
        node=rank - local_rank if claim.node is None else claim.node,
        variables=tuple((key, environ[key]) for key in claim.variables if key in environ),
    )


def _number(environ: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,9}", text):
        raise LaunchError(
            f"{key}={text}: must be a number; unset it if no manager started this process"
        )
    return int(text)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" -> [2, 2, 2, 1]. Raises LaunchError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text} is not a list such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(text: str) -> str:
    """The first host of a Slurm list: "node[03-05,9],login" -> "node03"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", text)
    return f"{match[1]}{match[2] or ''}{match[3] or ''}" if match else ""


def interface_of(address: str) -> str | None:
    """The network interface on the route to `address`; None if there is none. gloo would pick one by
    this host's name, which need not resolve to an address that the other machines can reach."""
    import psutil

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing, only selects the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in addresses):
            return str(name)
    return None
