"""Attention of one token per row over its cache, at a cost that grows with the tokens in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.load import has_kernels

DTYPES = (torch.bfloat16, torch.float32)


def can_attend(q: Tensor) -> bool:
    """Whether `attend` takes such queries here; else attention is torch's, over the whole cache."""
    return q.device.type == "cpu" and q.dtype in DTYPES and has_kernels()


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
    """q [B, H, h] at `positions` int64 [B], caches [B, K, S, h] -> [B, H, h].

    Of each of `runs`, (first query head, end, first KV head, end), the query heads share the KV heads
    in equal groups. A query sees the cache up to its position, of that the last `window` (0: all).
    Scores are multiplied by `scale` and, with a `cap`, bent to cap * tanh(score / cap); sums are in
    float32.
    """
    flat = [number for run in runs for number in run]
    return torch.ops.yoke_kernels.attend(q, k_cache, v_cache, positions, flat, scale, cap, window)
