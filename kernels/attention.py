"""Attention over a static cache at a cost that grows with the tokens in use, not with the cache.

How much is in use is known only as a step runs, and its graph is compiled for one shape: so this is an
operator. A token has loops of its own; of a chunk of a prompt, torch attends to the part in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import fake_attend, has_kernels

DTYPES = (torch.bfloat16, torch.float32)


def can_attend(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend` works here; else attention is torch's, over the whole cache."""
    return device.type == "cpu" and dtype in DTYPES and has_kernels()


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    runs: Sequence[tuple[int, int, int, int]],
    scale: float,
    cap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """q [B, T, H, h] at `positions` int64 [B, T], caches [B, K, S, h] -> [B, T, H, h].

    Of each of `runs`, (first query head, end, first KV head, end), the query heads share the KV heads
    in equal groups. A query sees the cache up to its position, of that the last `window` (0: all).
    Scores are multiplied by `scale` and, with a `cap`, bent to cap * tanh(score / cap).
    """
    flat = [number for run in runs for number in run]
    if q.shape[1] > 1:
        return _attend_chunk(q, k_cache, v_cache, positions, flat, scale, cap, window)
    one = torch.ops.yoke_kernels.attend(
        q.squeeze(1), k_cache, v_cache, positions.squeeze(1), flat, scale, cap, window
    )
    return one.unsqueeze(1)


def attend_in_groups(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    runs: Sequence[tuple[int, int, int, int]],
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


@torch.library.custom_op("yoke_chunks::attend", mutates_args=(), device_types="cpu")
def _attend_chunk(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    runs: list[int],
    scale: float,
    cap: float,
    window: int,
) -> Tensor:
    used = int(positions.max()) + 1
    keys, values = k_cache[:, :, :used], v_cache[:, :, :used]
    mask = causal_mask(positions, used, q.dtype, window)
    quads = [(runs[i], runs[i + 1], runs[i + 2], runs[i + 3]) for i in range(0, len(runs), 4)]
    return attend_in_groups(q, keys, values, mask, quads, scale, cap).contiguous()


_attend_chunk.register_fake(fake_attend)
