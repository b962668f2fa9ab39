"""Compile a step with a collective in it, and print whether its code was found on disk."""

from __future__ import annotations

import json

import torch
from torch._dynamo.utils import counters

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Rendezvous, open_group


def main(env: RankSettings, payload: str) -> int:
    number = json.loads(payload)["number"]
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 120.0) as group:

        def step(x: torch.Tensor) -> torch.Tensor:
            return ops.all_reduce(x + 1, group) * number

        result = torch.compile(step, fullgraph=True, dynamic=False)(torch.ones(4))
        torch.testing.assert_close(result, torch.full((4,), 2.0 * group.size * number))
        ops.barrier(group)  # one of them compiles for longer
    found = counters["inductor"]
    print(f"hits {found['fxgraph_cache_hit']} bypasses {found['fxgraph_cache_bypass']}", flush=True)
    return 0
