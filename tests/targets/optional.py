"""A group whose sums are DeepSpeed's: right for every type and layout, and traced without a break."""

from __future__ import annotations

from pathlib import Path

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, Rendezvous, open_group


def check(group: Group, dtype: torch.dtype, count: int) -> None:
    everyone = [
        torch.randint(-8, 8, (count,), generator=torch.Generator().manual_seed(rank)).to(dtype)
        for rank in range(group.size)
    ]
    mine = everyone[group.rank].clone()
    wanted = torch.stack([x.double() for x in everyone]).sum(0).to(dtype)
    assert torch.equal(ops.all_reduce(mine, group), wanted), (dtype, count)
    assert torch.equal(mine, everyone[group.rank]), "the input was changed"
    assert torch.equal(ops.all_gather(mine, group), torch.stack(everyone))


def main(env: RankSettings, payload: str) -> int:
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 600.0) as group:
        assert group.backend == "deepspeed"
        assert not list(Path("/dev/shm").glob(f"*yoke_{env.session}_*"))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            for count in (1, 33, 4096, 700_001):
                check(group, dtype, count)
        transposed = torch.arange(12.0).reshape(3, 4).t()
        assert torch.equal(ops.all_reduce(transposed, group), transposed * group.size)
        x = torch.full((4, 6), float(env.rank))

        def block(x: torch.Tensor) -> torch.Tensor:
            return ops.all_gather(ops.all_reduce(x * 2, group).relu() + x, group).sum(0)

        compiled = torch.compile(block, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), block(x))
        ops.barrier(group)
    if env.rank == 0:
        print("done", flush=True)
    return 0
