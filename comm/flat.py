"""The collectives of ranks that share one transport: shared memory, or a torch process group.

Each is one operator in a traced graph; with torch's transports, an operator and its wait. `comm.ops`
calls these functions for layers, `comm.machines` for the levels inside and between machines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comm import optional
from comm.errors import CommError
from comm.group import Group


def all_reduce(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """As `comm.ops.all_reduce`."""
    if group.backend == "shm":
        if out is None:
            return torch.ops.yoke.all_reduce.default(x, group.handle)
        torch.ops.yoke.all_reduce.out(x, group.handle, out=out)
        return out
    if group.size == 1:
        return into(out, x)
    if group.backend == "deepspeed" and optional.can_sum(x):
        return into(out, optional.all_reduce(x))
    return into(out, _call(torch.ops._c10d_functional.all_reduce, x, "sum", group))


def all_gather(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """As `comm.ops.all_gather`."""
    if group.size == 1:
        return into(out, x.unsqueeze(0))
    if group.backend == "shm":
        if out is None:
            return torch.ops.yoke.all_gather.default(x, group.size, group.handle)
        torch.ops.yoke.all_gather.out(x, group.size, group.handle, out=out)
        return out
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    return into(out, _call(gather, x.unsqueeze(0), group.size, group))


def broadcast(x: Tensor, root: int, group: Group, out: Tensor | None = None) -> Tensor:
    """As `comm.ops.broadcast`."""
    if group.size == 1:
        return into(out, x)
    if group.backend == "shm":
        if out is None:
            return torch.ops.yoke.broadcast.default(x, root, group.handle)
        torch.ops.yoke.broadcast.out(x, root, group.handle, out=out)
        return out
    return into(out, _call(torch.ops._c10d_functional.broadcast, x, root, group))


def _call(
    operator: torch._ops.OpOverloadPacket, x: Tensor, argument: str | int, group: Group
) -> Tensor:
    if not group.name:
        raise CommError(
            f"rank {group.rank} of {group.size} has no transport to call {operator}: this Group only "
            "describes a layout; open one with comm.group.open_group"
        )
    return wait(operator(x.contiguous(), argument, group.name))


def wait(x: Tensor) -> Tensor:
    """Wait for one of torch's collectives and return its result."""
    return torch.ops._c10d_functional.wait_tensor(x)


def into(out: Tensor | None, result: Tensor) -> Tensor:
    """Copy `result` to `out` and return `out`; without `out`, return `result`."""
    return result if out is None else out.copy_(result)
