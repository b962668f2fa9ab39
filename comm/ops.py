"""The collectives that layers call, one function each, whatever the transport.

Each call is one operator in a traced graph (for torch's transports an operator and its wait), so
`torch.compile(fullgraph=True)` passes over it without a break. Without `out` all are functional: the
input is left alone and a new tensor is returned; with `out` the result is written there, and `out` is
returned. Sums over shared memory are taken in fp32 and in rank order with one rounding, so that all
ranks hold the same bits.

What is not here: how ranks meet (`comm.group`), the calls of one transport (`comm.flat`) and of several
machines (`comm.machines`), and the operators themselves (`comm.shm`, `csrc/`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from comm import flat, machines
from comm.flat import into
from comm.group import Group


def all_reduce(x: Tensor, group: Group, *, out: Tensor | None = None) -> Tensor:
    """Sum of `x` over the ranks; same shape and dtype: float32, bfloat16, float16, int32 or int64.

    `out` may be `x`.
    """
    if group.backend == "shm+gloo":
        return into(out, machines.all_reduce(x, group))
    return flat.all_reduce(x, group, out)


def reduce_scatter(x: Tensor, group: Group, *, out: Tensor | None = None) -> Tensor:
    """This rank's part of the sum: [size * n, ...] -> [n, ...]; dtypes as for `all_reduce`."""
    if group.size == 1:
        return into(out, x)
    if group.backend == "shm":
        if out is None:
            return torch.ops.yoke.reduce_scatter.default(x, group.size, group.handle)
        torch.ops.yoke.reduce_scatter.out(x, group.size, group.handle, out=out)
        return out
    if group.backend == "nccl":
        scatter = torch.ops._c10d_functional.reduce_scatter_tensor
        return into(out, flat.wait(scatter(x.contiguous(), "sum", group.size, group.name)))
    return into(out, all_reduce(x, group).chunk(group.size)[group.rank].clone())


def all_gather(x: Tensor, group: Group, *, out: Tensor | None = None) -> Tensor:
    """`x` of every rank, stacked: [...] -> [size, ...], any dtype. All ranks pass the same shape."""
    if group.backend == "shm+gloo":
        return into(out, machines.all_gather(x, group))
    return flat.all_gather(x, group, out)


def broadcast(x: Tensor, root: int, group: Group, *, out: Tensor | None = None) -> Tensor:
    """`x` of rank `root`, on every rank. All ranks pass the same shape and dtype; `out` may be `x`."""
    if group.backend == "shm+gloo":
        return into(out, machines.broadcast(x, root, group))
    return flat.broadcast(x, root, group, out)


def barrier(group: Group) -> None:
    """Return when every rank has called this."""
    if group.backend == "shm":
        torch.ops.yoke.barrier(group.handle)
    elif group.size > 1:
        device = "cuda" if group.backend == "nccl" else "cpu"
        all_reduce(torch.zeros(1, device=device), group)


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group
) -> tuple[Tensor, Tensor]:
    """(normed, new_residual): what follows an attention or MLP whose outputs are split over ranks.

    new_residual = residual + sum over ranks of x, rounded once; normed = new_residual / rms * weight
    over the last dimension (Zhang and Sennrich, 2019). x, residual: [..., D], weight: [D], one dtype.
    """
    if group.backend == "shm":
        return torch.ops.yoke.all_reduce_add_rms_norm.default(x, residual, weight, eps, group.handle)
    total = all_reduce(x, group)
    new_residual = (residual.float() + total.float()).to(x.dtype)
    full = new_residual.float()
    scale = torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)
    return (full * scale).to(x.dtype) * weight, new_residual


def argmax(logits: Tensor, offset: int, group: Group) -> Tensor:
    """The largest entry of each row that is split by column: [rows, columns] -> int64 [rows].

    This rank's columns start at `offset` of the whole row; of equal values the lowest index wins. Ranks
    exchange one candidate a row, never the rows. A largest entry that is not a finite number is no
    choice: it gives a number below 0, which `value_of` reads (NaN counts as larger than all else).
    """
    if group.backend == "shm":
        return torch.ops.yoke.argmax.default(logits, offset, group.handle)
    if logits.shape[1] == 0:
        values, own = topk(logits, 1, offset, group)
        return _chosen(values, own)
    own = logits.argmax(1, keepdim=True)  # the first of equal ones
    values = logits.gather(1, own).float()
    if group.size == 1:
        return _chosen(values, own + offset)
    return _chosen(*_best_of_ranks(values, own + offset, 1, group))


def whole_argmax(logits: Tensor) -> Tensor:
    """`argmax` of rows that every rank holds whole: no exchange."""
    own = logits.argmax(1, keepdim=True)
    return _chosen(logits.gather(1, own), own)


# What `argmax` gives for a row without a choice (csrc/candidates.cpp has the same).
_NO_CHOICE = {-1: math.nan, -2: math.inf, -3: -math.inf}
NO_CHOICE = tuple(_NO_CHOICE)


def value_of(choice: int) -> float:
    """The largest entry of a row for which `argmax` gave a number below 0."""
    return _NO_CHOICE[choice]


def _chosen(values: Tensor, indices: Tensor) -> Tensor:
    """[rows, 1] of the largest entries -> [rows]: their indices, or what they are if not finite."""
    infinite = torch.where(values > 0, -2, -3)
    special = torch.where(values.isnan(), -1, infinite)
    return torch.where(values.isfinite(), indices, special).squeeze(1)


def topk(logits: Tensor, k: int, offset: int, group: Group) -> tuple[Tensor, Tensor]:
    """The `k` largest entries of each split row, best first: float32 values, int64 indices [rows, k].

    Ranks may hold different numbers of columns, also fewer than `k`. Ties and exchange as for `argmax`.
    """
    if group.backend == "shm":
        return torch.ops.yoke.topk.default(logits, k, offset, group.handle)
    # Stable, which torch.topk is not: which of equal values comes out must not depend on the ranks.
    values, indices = logits.float().sort(descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k] + offset
    if group.size == 1:
        return values, indices
    missing = k - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=float("-inf"))
    # Not the largest integer: pad's value goes through a double, which rounds that up and wraps it.
    indices = torch.nn.functional.pad(indices, (0, missing), value=2**62)
    return _best_of_ranks(values, indices, k, group)


def _best_of_ranks(values: Tensor, indices: Tensor, k: int, group: Group) -> tuple[Tensor, Tensor]:
    """The `k` best of each rank's candidates [rows, n]."""
    values = all_gather(values, group).movedim(0, 1).flatten(1)
    indices = all_gather(indices, group).movedim(0, 1).flatten(1)
    # By value, and those of one value by index: what fills up a short rank comes after every column.
    indices, order = indices.sort(stable=True)
    values, order = values.gather(1, order).sort(descending=True, stable=True)
    return values[:, :k], indices.gather(1, order[:, :k])
