"""Check every collective against plain sums, on each rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.errors import CommError
from comm.group import Group, Rendezvous, open_group
from comm.sizes import slot_bytes


def inputs(shape: tuple[int, ...], dtype: torch.dtype, size: int, seed: int) -> list[torch.Tensor]:
    """What each rank contributes: every rank can make all of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(size)]


def check(group: Group, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    everyone = inputs(shape, dtype, group.size, seed)
    mine = everyone[group.rank].clone()
    total = ops.all_reduce(mine, group)
    assert torch.equal(mine, everyone[group.rank]), "the input was changed"
    if group.backend == "shm":
        wanted = torch.zeros(shape)
        for x in everyone:  # in fp32 and in rank order, rounded once
            wanted += x.float()
        assert torch.equal(total, wanted.to(dtype)), (shape, dtype)
    else:
        wanted = torch.stack([x.double() for x in everyone]).sum(0)
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(total.double(), wanted, rtol=tolerance, atol=tolerance)
    gathered = ops.all_gather(mine, group)
    assert torch.equal(gathered, torch.stack(everyone))
    for other in ops.all_gather(total, group):
        assert torch.equal(other, total), "ranks hold different bits"
    root = seed % group.size
    assert torch.equal(ops.broadcast(mine, root, group), everyone[root])


def check_strided(group: Group) -> None:
    """Neither a transposed nor a shifted view is reduced wrongly."""
    everyone = inputs((17, 9), torch.float32, group.size, 5)
    wanted = sum(everyone[1:], everyone[0].clone())
    mine = everyone[group.rank]
    torch.testing.assert_close(ops.all_reduce(mine.t(), group), wanted.t())
    torch.testing.assert_close(ops.all_reduce(mine[1:, 1:], group), wanted[1:, 1:])
    flat, whole = mine.flatten()[3:], wanted.flatten()[3:]
    torch.testing.assert_close(ops.all_reduce(flat, group), whole)


def check_refusals(group: Group) -> None:
    """What cannot be summed is an error, on all ranks alike, and the group goes on."""
    if group.backend == "shm":
        with pytest.raises(RuntimeError, match="float32, bfloat16, float16, int32 and int64"):
            ops.all_reduce(torch.zeros(3, dtype=torch.bool), group)
        with pytest.raises(RuntimeError, match="999"):
            torch.ops.yoke.all_reduce(torch.zeros(3), 999)
    ops.barrier(group)


def main(env: RankSettings, payload: str) -> int:
    slot = json.loads(payload).get("elements_per_slot", slot_bytes(env.world_size) // 4)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 60.0) as group:
        # All have joined: the name must be gone.
        assert not list(Path("/dev/shm").glob(f"yoke-{env.session}*"))
        seed = 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((1,), (7,), (3, 5), (1024,), (slot - 1,), (slot,), (2 * slot + 3,)):
                seed += 1
                check(group, shape, dtype, seed)
        if group.backend == "shm":
            check(group, (0,), torch.float32, 1)
        check_strided(group)
        check_refusals(group)
    with pytest.raises(CommError, match="no transport"):
        ops.all_reduce(torch.zeros(1), Group(0, 2))
    return 0
