"""The collectives that layers call, one function each, whatever the transport.

Each call is one operator in a traced graph (for gloo an operator and its wait), so
`torch.compile(fullgraph=True)` passes over it without a break. All are functional: the input is left
alone and a new tensor is returned. Sums over shared memory are taken in fp32 and in rank order with
one rounding, so that all ranks hold the same bits.

What is not here: reduce-scatter, fused forms, collectives on GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comm.errors import CommError
from comm.group import Group


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum of `x` over the ranks; same shape and dtype (float32, bfloat16 or float16)."""
    if group.size == 1:
        return x
    if group.backend == "shm":
        return torch.ops.yoke.all_reduce(x, group.handle)
    return _gloo(torch.ops._c10d_functional.all_reduce, x, "sum", group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """`x` of every rank, stacked: [...] -> [size, ...]. All ranks must pass the same shape."""
    if group.size == 1:
        return x.unsqueeze(0)
    if group.backend == "shm":
        return torch.ops.yoke.all_gather(x, group.size, group.handle)
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    return _gloo(gather, x.unsqueeze(0), group.size, group)


def broadcast(x: Tensor, root: int, group: Group) -> Tensor:
    """`x` of rank `root`, on every rank. All ranks must pass the same shape and dtype."""
    if group.size == 1:
        return x
    if group.backend == "shm":
        return torch.ops.yoke.broadcast(x, root, group.handle)
    return _gloo(torch.ops._c10d_functional.broadcast, x, root, group)


def barrier(group: Group) -> None:
    """Return when every rank has called this."""
    if group.size == 1:
        return
    if group.backend == "shm":
        torch.ops.yoke.barrier(group.handle)
    else:
        all_reduce(torch.zeros(1), group)


def _gloo(
    operator: torch._ops.OpOverloadPacket, x: Tensor, argument: str | int, group: Group
) -> Tensor:
    if group.backend != "gloo":
        raise CommError(f"rank {group.rank} of {group.size} has no transport to call {operator}")
    result: Tensor = operator(x.contiguous(), argument, group.name)
    return torch.ops._c10d_functional.wait_tensor(result)
