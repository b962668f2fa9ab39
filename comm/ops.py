"""The collectives that layers call: one function each, for every transport.

Each call is one operator in a traced graph (with torch's transports, an operator and its wait), so
`torch.compile(fullgraph=True)` traces it without a graph break. Without `out` a function returns a new
tensor and does not change its input; with `out` it writes the result there and returns `out`.
Shared-memory sums are computed in fp32, in rank order, and rounded once, so all ranks hold the same
bits.

What is not here: how ranks find each other (`comm.group`), the calls of one transport (`comm.flat`) and
of several machines (`comm.machines`), and the operators themselves (`comm.shm`, `csrc/`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from comm import flat, machines
from comm.flat import into
from comm.group import Group


def all_reduce(x: Tensor, group: Group, *, out: Tensor | None = None) -> Tensor:
    """The sum of `x` over the ranks, of x's shape and dtype: float32, bfloat16, float16, int32, int64.

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
    """Returns (normed, new_residual): the step after attention or an MLP, where `x` is a partial sum.

    new_residual = residual + sum over ranks of x, rounded once; normed = new_residual / rms * weight
    over the last dimension (RMSNorm, Zhang and Sennrich, 2019). x, residual: [..., D], weight: [D], all
    of one dtype.
    """
    if group.backend == "shm":
        return torch.ops.yoke.all_reduce_add_rms_norm.default(x, residual, weight, eps, group.handle)
    total = all_reduce(x, group)
    new_residual = (residual.float() + total.float()).to(x.dtype)
    full = new_residual.float()
    scale = torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)
    return (full * scale).to(x.dtype) * weight, new_residual


def argmax(logits: Tensor, offset: int, group: Group) -> Tensor:
    """The index of each row's largest entry, rows split by column: [rows, columns] -> int64 [rows].

    `offset` is the index of this rank's first column in the whole row. Of equal values the lowest index
    wins. Ranks exchange one candidate per row, never the rows. If the largest entry is not finite, the
    result is a number below 0, which `value_of` decodes. NaN counts as larger than everything else.
    """
    if group.backend == "shm":
        return torch.ops.yoke.argmax.default(logits, offset, group.handle)
    if logits.shape[1] == 0:
        values, own = topk(logits, 1, offset, group)
        return _chosen(values, own)
    own = logits.argmax(1, keepdim=True)  # the first of equal values
    values = logits.gather(1, own).float()
    if group.size == 1:
        return _chosen(values, own + offset)
    return _chosen(*_best_of_ranks(values, own + offset, 1, group))


def whole_argmax(logits: Tensor) -> Tensor:
    """`argmax` of whole rows, which every rank holds: [rows, columns] -> int64 [rows], no exchange."""
    own = logits.argmax(1, keepdim=True)
    return _chosen(logits.gather(1, own), own)


# What `argmax` returns if the largest entry is not finite (csrc/candidates.cpp has the same codes).
_NO_CHOICE = {-1: math.nan, -2: math.inf, -3: -math.inf}
NO_CHOICE = tuple(_NO_CHOICE)


def value_of(choice: int) -> float:
    """The largest entry of a row for which `argmax` returned `choice`, a number below 0."""
    return _NO_CHOICE[choice]


def _chosen(values: Tensor, indices: Tensor) -> Tensor:
    """The largest entries and their indices, [rows, 1] each -> [rows]: indices; codes if not finite."""
    infinite = torch.where(values > 0, -2, -3)
    special = torch.where(values.isnan(), -1, infinite)
    return torch.where(values.isfinite(), indices, special).squeeze(1)


def topk(logits: Tensor, k: int, offset: int, group: Group) -> tuple[Tensor, Tensor]:
    """The `k` largest entries of each split row, best first: float32 values, int64 indices [rows, k].

    Ranks may hold different numbers of columns, even fewer than `k`. `offset`, ties and the exchange
    are as in `argmax`.
    """
    if group.backend == "shm":
        return torch.ops.yoke.topk.default(logits, k, offset, group.handle)
    # torch.topk is not stable, and the choice among equal values must not depend on the ranks.
    values, indices = logits.float().sort(descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k] + offset
    if group.size == 1:
        return values, indices
    missing = k - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=float("-inf"))
    # Not the largest int64: pad converts its value to a double, which rounds up and then overflows.
    indices = torch.nn.functional.pad(indices, (0, missing), value=2**62)
    return _best_of_ranks(values, indices, k, group)


def _best_of_ranks(values: Tensor, indices: Tensor, k: int, group: Group) -> tuple[Tensor, Tensor]:
    """The `k` best of all ranks' candidates: values and indices, [rows, n] each -> [rows, k]."""
    values = all_gather(values, group).movedim(0, 1).flatten(1)
    indices = all_gather(indices, group).movedim(0, 1).flatten(1)
    # Sorts by value, equal values by index: the padding of a short rank comes after every column.
    indices, order = indices.sort(stable=True)
    values, order = values.gather(1, order).sort(descending=True, stable=True)
    return values[:, :k], indices.gather(1, order[:, :k])
