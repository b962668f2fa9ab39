"""Join by shared memory where nothing can be compiled."""

from __future__ import annotations

import sys

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import GroupOptions, Rendezvous, open_group


def main(env: RankSettings, payload: str) -> int:
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    report = lambda message: print(message, file=sys.stderr)  # noqa: E731
    with open_group(
        env.rank, env.world_size, env.backend, rendezvous, 60.0, GroupOptions(on_fallback=report)
    ) as group:
        assert group.backend == "gloo"
        assert ops.all_reduce(torch.ones(2), group).tolist() == [2.0, 2.0]
    return 0
