"""Rank 1 does not come, or comes with something else: the others say so."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Rendezvous, open_group, set_timeout


def main(env: RankSettings, payload: str) -> int:
    words = json.loads(payload)
    case = words["case"]
    _gather(Path(words["folder"]), env)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    if case == "join" and env.rank == 1:
        deadline = time.monotonic() + 60
        found: list[Path] = []
        while not found and time.monotonic() < deadline:
            found = list(Path("/dev/shm").glob(f"yoke-{env.session}*"))
            time.sleep(0.05)
        print([f"mode {stat.S_IMODE(segment.stat().st_mode):o}" for segment in found], flush=True)
        time.sleep(4)
        return 0
    timeout_s = 2.5 if case == "join" else 60.0
    try:
        with open_group(env.rank, env.world_size, env.backend, rendezvous, timeout_s) as group:
            ops.barrier(group)
            set_timeout(group, 1.5 if case == "late" else 60.0)
            if case == "late" and env.rank == 1:
                time.sleep(6)
                return 0
            ops.all_reduce(torch.zeros(8 + env.rank if case == "mismatch" else 8), group)
    except RuntimeError as error:
        print(f"rank {env.rank}: {str(error).splitlines()[0]}", flush=True)
    return 0


def _gather(folder: Path, env: RankSettings) -> None:
    """Until all ranks are here: importing torch takes each its own time where processors are few."""
    (folder / f"rank-{env.rank}").touch()
    while len(list(folder.glob("rank-*"))) < env.world_size:
        time.sleep(0.01)
