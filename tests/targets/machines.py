"""Shared memory inside machines and gloo between them, with machines that are only numbers."""

from __future__ import annotations

import json

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Rendezvous, open_group, set_timeout


def main(env: RankSettings, payload: str) -> int:
    options = json.loads(payload)
    node = options["nodes"][env.rank]
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd, node=node)
    generator = torch.Generator().manual_seed(0)
    with open_group(env.rank, env.world_size, "shm+gloo", rendezvous, 60.0) as group:
        set_timeout(group, 30.0)
        assert group.backend == "shm+gloo", group
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            for shape in ((1,), (3, 5), (70001,)):
                everyone = [
                    torch.randn(shape, generator=generator).mul(8).to(dtype) for _ in range(group.size)
                ]
                mine = everyone[group.rank].clone()
                total = ops.all_reduce(mine, group)
                if dtype.is_floating_point:  # rounded once, whatever the order
                    wanted = torch.stack([x.double() for x in everyone]).sum(0)
                    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
                    torch.testing.assert_close(total.double(), wanted, rtol=tolerance[dtype], atol=1e-3)
                else:
                    assert torch.equal(total, torch.stack(everyone).sum(0))
                gathered = ops.all_gather(mine, group)
                assert torch.equal(gathered, torch.stack(everyone))
                for other in ops.all_gather(total, group):
                    assert torch.equal(other, total), "ranks hold different bits"
                for root in range(group.size):
                    assert torch.equal(ops.broadcast(mine, root, group), everyone[root])
                many = mine.unsqueeze(0).expand(group.size, *shape).clone()
                assert torch.equal(ops.reduce_scatter(many, group)[0], total)
                assert torch.equal(mine, everyone[group.rank]), "the input was changed"
        ops.barrier(group)
        if not options["compile"]:
            return 0

        def block(x: torch.Tensor) -> torch.Tensor:
            return ops.all_gather(ops.all_reduce(x * 2, group).relu(), group).sum(0)

        x = torch.randn(4, 6)
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))
    return 0
