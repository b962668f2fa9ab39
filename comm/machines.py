"""Collectives over several machines: shared memory inside each, gloo between one leader per machine.

A sum crosses the network once per machine, not once per rank. Sums of 16-bit types are sent as float32
and rounded once, at the end. Gloo gives all leaders the same bits, and every rank copies its leader's
bits, so all ranks hold the same result.

What is not here: the collectives inside one machine (`comm.flat`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from comm import flat
from comm.group import Group


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """As `comm.ops.all_reduce`: sum inside each machine, sum over the leaders, broadcast back."""
    assert group.local is not None
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    total = flat.all_reduce(x.float() if narrow else x, group.local)
    if group.leaders is not None:
        total = flat.all_reduce(total, group.leaders)
    return flat.broadcast(total, 0, group.local).to(x.dtype)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[...] -> [size, ...], in rank order, however the ranks are spread over the machines."""
    assert group.local is not None
    most = max(len(ranks) for ranks in group.members)
    # Gloo requires equal parts: machines with fewer ranks pad with zeros, which are dropped below.
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
    """As `comm.ops.broadcast`: inside the root's machine, over the leaders, inside each machine."""
    assert group.local is not None
    machine = next(i for i, ranks in enumerate(group.members) if root in ranks)
    if group.rank in group.members[machine]:
        x = flat.broadcast(x, group.members[machine].index(root), group.local)
    if group.leaders is not None:
        x = flat.broadcast(x, machine, group.leaders)
    return flat.broadcast(x, 0, group.local)
