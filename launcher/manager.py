"""Ranks that somebody else started: torchrun, srun, mpirun. Their variables -> where this rank is.

Reading the variables is pure. `meet` settles what such a manager does not say: between the ranks of
one machine, a free port for the rendezvous.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import LaunchError


@dataclass(frozen=True)
class Managed:
    """A rank's place by its manager's word. `run_id` is the same for all ranks of one run and differs
    between runs on a machine; `node` tells its machines apart; `master_port` 0 is not settled yet;
    `agent_store`: torch's elastic agent serves a store at the master address."""

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

    @property
    def session(self) -> str:
        """The token that names derive from."""
        return hashlib.sha256(f"{os.getuid()} {self.run_id}".encode()).hexdigest()[:16]


# Of each: rank, world size, local rank, local world size, and what names the run.
_MPI = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID", "PMI_FD")),
)  # fmt: skip


def find_manager(environ: Mapping[str, str], parent_pid: int) -> Managed | None:
    """Who started this process as one of several ranks, or None. Raises LaunchError for variables
    that contradict themselves."""
    # `srun` sets the step's variables; a batch script has the job's, and is no rank.
    if "RANK" in environ and "WORLD_SIZE" in environ and "LOCAL_RANK" in environ:
        return _torchrun(environ, parent_pid)
    for name, rank, size, local_rank, local_size, ids in _MPI:
        if rank in environ and size in environ and _number(environ, size) > 1:
            world = _number(environ, size)
            run_id = next((environ[key] for key in ids if key in environ), str(parent_pid))
            return _checked(
                environ, name, _number(environ, rank), world, _number(environ, local_rank),
                _number(environ, local_size), f"{name} {run_id}", f"-x MASTER_ADDR=HOST ({name})",
            )  # fmt: skip
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        world = _number(environ, "SLURM_STEP_NUM_TASKS")
        if world > 1:
            node = _number(environ, "SLURM_NODEID", 0)
            per_node = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
            if node >= len(per_node):
                raise LaunchError(f"SLURM_NODEID={node} is beyond SLURM_STEP_TASKS_PER_NODE")
            run_id = f"srun {environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}"
            hosts = first_host(environ.get("SLURM_STEP_NODELIST", ""))
            return _checked(
                {"MASTER_ADDR": hosts, **environ} if hosts else environ, "srun",
                _number(environ, "SLURM_PROCID"), world, _number(environ, "SLURM_LOCALID"),
                per_node[node], run_id, "MASTER_ADDR=HOST in the environment", node,
            )  # fmt: skip
    return None


def _torchrun(environ: Mapping[str, str], parent_pid: int) -> Managed:
    elastic = "TORCHELASTIC_RUN_ID" in environ
    world = _number(environ, "WORLD_SIZE")
    parts = [environ.get("TORCHELASTIC_RUN_ID", str(parent_pid)), environ.get("MASTER_PORT", "")]
    parts.append(environ.get("TORCHELASTIC_RESTART_COUNT", ""))
    place = _checked(
        environ,
        "torchrun" if elastic else "the environment (RANK, WORLD_SIZE)",
        _number(environ, "RANK"),
        world,
        _number(environ, "LOCAL_RANK"),
        _number(environ, "LOCAL_WORLD_SIZE", world),
        "torchrun " + " ".join(parts),
        "MASTER_ADDR=HOST in the environment",
    )
    node = _number(environ, "GROUP_RANK", place.node)
    agent = elastic and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Managed(**{**vars(place), "agent_store": agent, "node": node})


def _checked(
    environ: Mapping[str, str],
    manager: str,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    run_id: str,
    hint: str,
    node: int | None = None,
) -> Managed:
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise LaunchError(
            f"{manager} says rank {rank} of {world_size}, on this machine {local_rank} of "
            f"{local_world_size}: that cannot be; are variables of another run set?"
        )
    address = environ.get("MASTER_ADDR", "127.0.0.1" if local_world_size == world_size else "")
    port = _number(environ, "MASTER_PORT", 0)
    if local_world_size < world_size and (not address or not port):
        raise LaunchError(
            f"{world_size} ranks on several machines need to know where rank 0 is: give them "
            f"MASTER_PORT=N and {hint}"
        )
    node = (
        rank - local_rank if node is None else node
    )  # the first rank there, where ranks come in blocks
    return Managed(manager, rank, world_size, local_rank, local_world_size, address, port, run_id, node)


def _number(environ: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,9}", text):
        raise LaunchError(f"{key}={text}: the launcher that set it must give a number")
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
    """The first name of Slurm's "node[03-05,9],login" -> "node03"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", text)
    return f"{match[1]}{match[2] or ''}{match[3] or ''}" if match else ""


def meet(place: Managed, deadline_s: float) -> tuple[int, socket.socket | None]:
    """The port of the rendezvous and, on rank 0, a socket that listens on it.

    Where the manager named no port, rank 0 takes a free one and tells the other ranks of this machine
    through a socket in the kernel's abstract namespace, which leaves no file. Raises LaunchError when
    a rank does not come in time.
    """
    if place.master_port or place.world_size == 1:
        return place.master_port, None
    until = time.monotonic() + deadline_s
    name = f"\0yoke-{place.session}"
    if place.rank == 0:
        store = socket.create_server(("127.0.0.1", 0), backlog=place.world_size)
        port = store.getsockname()[1]
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(name)
            door.listen(place.world_size)
            missing = place.world_size - 1
            while missing:
                door.settimeout(max(until - time.monotonic(), 0.001))
                try:
                    peer, _ = door.accept()
                except TimeoutError:
                    raise LaunchError(
                        f"{missing} of {place.world_size} ranks did not come within {deadline_s:g} s"
                    ) from None
                with peer:
                    if _uid(peer) == os.getuid():
                        peer.sendall(struct.pack("<I", port))
                        missing -= 1
        return port, store
    while True:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(max(until - time.monotonic(), 0.001))
            try:
                line.connect(name)
                if _uid(line) == os.getuid() and len(data := line.recv(4)) == 4:
                    return struct.unpack("<I", data)[0], None
            except (ConnectionRefusedError, ConnectionResetError, TimeoutError):
                pass
        if time.monotonic() >= until:
            raise LaunchError(f"rank 0 did not answer rank {place.rank} within {deadline_s:g} s")
        time.sleep(0.02)


def _uid(line: socket.socket) -> int:
    """Whose process is at the other end."""
    _, uid, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def interface_of(address: str) -> str | None:
    """The network interface that leads to `address`: gloo would guess by the host's name, which need
    not resolve to one that the other machines can reach."""
    import psutil  # type: ignore[import-untyped]

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing; it asks for the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in addresses):
            return str(name)
    return None
