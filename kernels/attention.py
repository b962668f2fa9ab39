"""Attention over a static cache at a cost that grows with the tokens in use, not with the cache.

How much is in use is known only as a step runs, and its graph is compiled for one shape: so this is an
operator, and so is writing the cache. Tokens come in any mixture, each with the cache row that it
belongs to and its position there. Consecutive tokens of a row are a chunk (of a prompt, or what a draft
proposed) and share the reading of keys and values; a token that is alone has loops of its own.

A layer of a model calls `write_and_attend`, which also turns queries and keys by their positions: a
call costs a token some microseconds, whatever is done in it. `write` and `attend` are its parts.

The functions called `..._reference` are the same in torch, over the whole cache: what operators are
tested against, and what any device and compiler takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels
from kernels.rotary import Angles, rotate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Runs = Sequence[tuple[int, int, int, int]]


class KVCache(NamedTuple):
    """Keys and values [R, K, S, h] of R rows, K KV heads and S positions; int8 ones are multiplied by
    scales, float32 [R, K, S], one per token and head."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


def new_cache(
    num_rows: int,
    num_kv: int,
    cache_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> KVCache:
    """An empty cache of float32, bfloat16, float16 or int8."""
    shape = (num_rows, num_kv, cache_len, head_dim)
    k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return KVCache(k, v, None, None)
    k_scale, v_scale = (torch.zeros(shape[:3], device=device) for _ in range(2))
    return KVCache(k, v, k_scale, v_scale)


def can_attend(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are operators for tokens of `dtype`; else attention is torch's, over the whole
    cache."""
    return device.type == "cpu" and dtype in DTYPES and has_kernels()


def write(cache: KVCache, k: Tensor, v: Tensor, rows: Tensor | None, positions: Tensor) -> None:
    """Put k and v [N, K, h] of N tokens into the cache, in place, at `rows` and `positions`, both int64
    [N] (rows None: token i in row i).

    int8 is symmetric: the largest of a head's numbers becomes 127. Where two tokens name the same
    place, the last one is what stays; where torch writes (see `can_attend`) it is one of the two.
    """
    if can_attend(k.device, k.dtype):
        torch.ops.yoke_kernels.write_kv(*cache, k, v, rows, positions)
    else:
        write_reference(cache, k, v, rows, positions)


def attend(
    q: Tensor,
    cache: KVCache,
    rows: Tensor | None,
    positions: Tensor,
    runs: Runs,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    sources: Tensor | None = None,
) -> Tensor:
    """q [N, H, h] of N tokens -> [N, H, h]. Token i sees the cache of row rows[i] up to positions[i],
    both int64 [N] (rows None: token i in row i, of as many rows), of that the last `window` (0: all).

    The cache is of q's dtype, float16 or int8. Of each of `runs`, (first query head, end, first KV
    head, end), the query heads share the KV heads in equal groups. Scores are multiplied by `scale`
    and, with a `cap`, bent to cap * tanh(score / cap). With `sources`, int32 [N, S], what token i sees
    at position t lies in row sources[i, t], and `rows` is ignored. Raises RuntimeError for positions,
    rows or shapes that do not go together.
    """
    if not can_attend(q.device, q.dtype):
        return attend_reference(q, cache, rows, positions, runs, scale, cap, window, sources)
    flat = [number for run in runs for number in run]
    return torch.ops.yoke_kernels.attend(q, *cache, rows, positions, flat, scale, cap, window, sources)


def write_and_attend(
    qkv: Tensor,
    angles: Angles | None,
    cache: KVCache,
    rows: Tensor | None,
    positions: Tensor,
    runs: Runs,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    sources: Tensor | None = None,
) -> Tensor:
    """All between a layer's products: [N, (H + 2 K) * h], the heads of queries, keys and values of N
    tokens, -> [N, H * h].

    Queries and keys are turned by the `angles` of their positions (None: not at all), in float32 and
    rounded once, to the same bits as `kernels.rotary.rotate` has; then `write` and `attend`, which tell
    of the rest.
    """
    if not can_attend(qkv.device, qkv.dtype):
        return write_and_attend_reference(
            qkv, angles, cache, rows, positions, runs, scale, cap, window, sources
        )
    flat = [number for run in runs for number in run]
    return torch.ops.yoke_kernels.write_and_attend(
        qkv,
        *(angles or (None, None, False)),
        *cache,
        rows,
        positions,
        flat,
        scale,
        cap,
        window,
        sources,
    )


def write_and_attend_reference(
    qkv: Tensor,
    angles: Angles | None,
    cache: KVCache,
    rows: Tensor | None,
    positions: Tensor,
    runs: Runs,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    sources: Tensor | None = None,
) -> Tensor:
    """As `write_and_attend`, on any device."""
    _, num_kv, _, head_dim = cache.k.shape
    heads = qkv.unflatten(-1, (-1, head_dim))
    num_q = heads.shape[-2] - 2 * num_kv
    qk, v = heads.split((num_q + num_kv, num_kv), dim=-2)
    if angles is not None:  # queries and keys as one, in one kernel
        qk = rotate(qk, angles.cos[positions], angles.sin[positions], angles.interleaved)
    q, k = qk.split((num_q, num_kv), dim=-2)
    write_reference(cache, k, v, rows, positions)
    return attend_reference(q, cache, rows, positions, runs, scale, cap, window, sources).flatten(1)


def write_reference(
    cache: KVCache, k: Tensor, v: Tensor, rows: Tensor | None, positions: Tensor
) -> None:
    """As `write`, on any device."""
    if rows is None:
        rows = torch.arange(k.shape[0], device=k.device)
    for new, into, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        if scales is None:
            into[rows, :, positions] = new.to(into.dtype)
            continue
        largest = new.float().abs().amax(-1)
        scales[rows, :, positions] = largest / 127
        # Divided, as `127 / largest` is not: that is the reciprocal's product.
        factor = torch.where(largest > 2.0**-100, torch.full_like(largest, 127) / largest, 0.0)
        into[rows, :, positions] = (new.float() * factor.unsqueeze(-1)).round().to(torch.int8)


def attend_reference(
    q: Tensor,
    cache: KVCache,
    rows: Tensor | None,
    positions: Tensor,
    runs: Runs,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    sources: Tensor | None = None,
) -> Tensor:
    """As `attend`, on any device: static shapes, over the whole cache. Only with rows=None, or one row,
    and a cache of q's dtype is the cache not copied."""
    num_rows, _, cache_len, _ = cache.k.shape
    keys, values = (
        _numbers(*part, q.dtype) for part in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    mask = causal_mask(positions.unsqueeze(1), cache_len, q.dtype, window)  # [N, 1, 1, S]
    if sources is not None:
        at = torch.arange(sources.shape[1], device=q.device)
        keys, values = (x[sources, :, at].transpose(1, 2) for x in (keys, values))  # [N, K, S, h]
        mask = mask[..., : sources.shape[1]]
    elif rows is not None:
        # All tokens over all rows as one long one, of which each sees its own part.
        keys, values = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (keys, values))
        other = rows.unsqueeze(1) != torch.arange(num_rows, device=q.device)  # [N, R]
        mask = mask.squeeze(1).masked_fill(other.unsqueeze(2), float("-inf"))  # [N, R, S]
        return attend_in_groups(
            q.unsqueeze(0), keys, values, mask.flatten(1)[None, None], runs, scale, cap
        )[0]
    return attend_in_groups(q.unsqueeze(1), keys, values, mask, runs, scale, cap).squeeze(1)


def _numbers(cached: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scales is None:
        return cached.to(dtype)
    return (cached * scales.unsqueeze(-1)).to(dtype)


def attend_in_groups(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    runs: Runs,
    scale: float,
    cap: float,
) -> Tensor:
    """The same with torch's attention over all of keys and values [B, K, S, h]; `mask` [B, 1, T, S] is
    added to the scores. The slow reference, and what any device and compiler takes."""
    batch, length, _, size = q.shape
    heads = q.transpose(1, 2)
    parts = []
    for q_start, q_stop, kv_start, kv_stop in runs:
        # The query heads that share a KV head become further rows of its queries, so that the cache is
        # read once and never repeated: [B, k * g, T, h] -> [B, k, g * T, h].
        count = kv_stop - kv_start
        group = (q_stop - q_start) // count
        rows = heads[:, q_start:q_stop].reshape(batch, count, group * length, size)
        own = keys[:, kv_start:kv_stop], values[:, kv_start:kv_stop]
        attended = _softmax_attention(rows, *own, mask.repeat(1, 1, group, 1), scale, cap)
        parts.append(attended.reshape(batch, count * group, length, size))
    return torch.cat(parts, dim=1).transpose(1, 2)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float
) -> Tensor:
    if not cap:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = cap * torch.tanh((q @ k.transpose(2, 3)).float() * (scale / cap))
    return torch.softmax(scores + mask.float(), dim=-1).to(v.dtype) @ v


def causal_mask(positions: Tensor, cache_len: int, dtype: torch.dtype, window: int = 0) -> Tensor:
    """[B, 1, T, S] of 0 and -inf: a query at positions [B, T] sees the cache up to its own position,
    and of that the last `window` tokens, itself among them (0: all)."""
    cache = torch.arange(cache_len, device=positions.device)
    unseen = cache > positions.unsqueeze(-1)
    if window:
        unseen |= cache <= positions.unsqueeze(-1) - window
    mask = torch.zeros(unseen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill(unseen, float("-inf")).unsqueeze(1)
