"""Collectives over several machines: shared memory inside each, gloo between one leader of each.

A sum crosses the network once per machine and not once per rank. Sums of 16-bit types travel as
float32 and are rounded once, at the end. Every rank of a machine gets the leader's bits, and the
leaders get the same from gloo, so all ranks hold the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comm import flat
from comm.group import Group


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum inside each machine, sum of those between the leaders, and out again."""
    assert group.local is not None
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    total = flat.all_reduce(x.float() if narrow else x, group.local)
    if group.leaders is not None:
        total = flat.all_reduce(total, group.leaders)
    return flat.broadcast(total, 0, group.local).to(x.dtype)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[...] -> [size, ...] in the order of the ranks, whichever machine they are on."""
    assert group.local is not None
    most = max(len(ranks) for ranks in group.members)
    # Gloo wants equal parts: machines with fewer ranks fill up with zeros, which nobody looks at.
    gathered = flat.all_gather(x, group.local)  # [local size, ...]
    padded = x.new_zeros((most, *x.shape))
    padded[: gathered.shape[0]] = gathered
    everyone = x.new_empty((len(group.members), most, *x.shape))
    if group.leaders is not None:
        everyone = flat.all_gather(padded, group.leaders)
    everyone = flat.broadcast(everyone, 0, group.local).flatten(0, 1)
    places = {rank: i * most + j for i, m in enumerate(group.members) for j, rank in enumerate(m)}
    return everyone[[places[rank] for rank in range(group.size)]]


def broadcast(x: Tensor, root: int, group: Group) -> Tensor:
    """From the root to its machine, between the leaders, and to the others."""
    assert group.local is not None
    machine = next(i for i, ranks in enumerate(group.members) if root in ranks)
    if group.rank in group.members[machine]:
        x = flat.broadcast(x, group.members[machine].index(root), group.local)
    if group.leaders is not None:
        x = flat.broadcast(x, machine, group.leaders)
    return flat.broadcast(x, 0, group.local)
