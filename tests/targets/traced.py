"""The operators as torch sees them: schemas, fake kernels, and a compiled function."""

from __future__ import annotations

from typing import Any

import torch

from comm import ops
from comm.group import Rendezvous, open_group


def main(env: Any, payload: str) -> int:
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 120.0) as group:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(env.rank))
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        for call in (
            (torch.ops.yoke.all_reduce.default, (x, group.handle)),
            (torch.ops.yoke.all_gather.default, (x, group.size, group.handle)),
            (torch.ops.yoke.broadcast.default, (x, 0, group.handle)),
        ):
            torch.library.opcheck(*call, test_utils=tests)

        def block(x: torch.Tensor) -> torch.Tensor:
            y = ops.all_reduce(x * 2, group).relu()
            return ops.all_gather(ops.broadcast(y + x, 1, group), group).sum(0)

        compiled = torch.compile(block, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), block(x))
    return 0
