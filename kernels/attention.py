"""temp"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KVCache(NamedTuple):
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


def can_attend(device, dtype):
    return True


def new_cache(num_rows, num_kv, cache_len, head_dim, dtype, device):
    shape = (num_rows, num_kv, cache_len, head_dim)
    return KVCache(
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
        None,
        None,
    )


def write(cache, k, v, rows, positions):
    if rows is None:
        rows = torch.arange(positions.shape[0], device=positions.device)
    cache.k[rows, :, positions] = k.to(cache.k.dtype)
    cache.v[rows, :, positions] = v.to(cache.k.dtype)


def attend(q, cache, rows, positions, runs, scale, cap=0.0, window=0, sources=None):
    N = q.shape[0]
    R, K, S, h = cache.k.shape
    if rows is None:
        rows = torch.arange(N)
    where = torch.arange(S)
    if sources is None:
        src = rows[:, None].expand(N, S)
    else:
        src = sources.long()
    k = cache.k.transpose(1, 2)[src, where]  # N,S,K,h
    v = cache.v.transpose(1, 2)[src, where]
    seen = where[None] <= positions[:, None]
    if window:
        seen &= where[None] > positions[:, None] - window
    parts = []
    for a, b, c, d in runs:
        g = (b - a) // (d - c)
        qq = q[:, a:b].unflatten(1, (d - c, g))
        s = torch.einsum("nkgh,nskh->nkgs", qq.float(), k[:, :, c:d].float()) * scale
        if cap:
            s = cap * torch.tanh(s / cap)
        s = s.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        parts.append(torch.einsum("nkgs,nskh->nkgh", s, v[:, :, c:d].float()).flatten(1, 2).to(q.dtype))
    return torch.cat(parts, 1)
