"""Attention over a static cache, at a cost that grows with the tokens in use, not with the cache size.

The number of tokens in use is known only when a step runs, and the graph is compiled for one shape. So
attention is an operator, and so is writing the cache. The tokens of a call may belong to any cache
rows: each comes with its cache row and its position there. Consecutive tokens of a row are a chunk (of
a prompt, or draft tokens) and share the reading of keys and values; a single token has loops of its
own.

A model's layer calls `write_and_attend`, which also rotates queries and keys by their positions,
because each call costs a token some microseconds, whatever it does. `write_kv` and `attend` are its
parts.

The functions `..._reference` are the same in torch, over the whole cache. Tests compare the operators
with them, and they run on any device and with any compiler.

What is not here: which row and position a token has (`engine`), and rotary angles (`models.rope`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels
from kernels.rotary import Angles, rotate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Runs = Sequence[tuple[int, int, int, int]]


class Rule(NamedTuple):
    """How a layer attends. In each of `runs`, (first query head, end, first KV head, end), the query
    heads share the KV heads in equal groups. Scores are multiplied by `scale` and, with a `cap`,
    soft-capped to cap * tanh(score / cap). A token attends only to the last `window` positions up to
    its own (0: to all)."""

    runs: Runs
    scale: float
    cap: float = 0.0
    window: int = 0


class Places(NamedTuple):
    """Where N tokens are in a cache. rows and positions: int64 [N]; rows None: token i has row i. With
    `sources`, int32 [N, S], token i reads position t from row sources[i, t], and `rows` says only where
    it is written."""

    rows: Tensor | None
    positions: Tensor
    sources: Tensor | None = None


class KVCache(NamedTuple):
    """Keys and values [R, K, S, h]: R cache rows, K KV heads, S positions, head size h. If they are
    int8, the scales are float32 [R, K, S], one per token and head; else None."""

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
    """A cache of zeros, of dtype float32, bfloat16, float16 or int8."""
    shape = (num_rows, num_kv, cache_len, head_dim)
    k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return KVCache(k, v, None, None)
    k_scale, v_scale = (torch.zeros(shape[:3], device=device) for _ in range(2))
    return KVCache(k, v, k_scale, v_scale)


def can_attend(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operators take tokens of `dtype` on `device`. Otherwise the torch reference runs,
    over the whole cache."""
    return device.type == "cpu" and dtype in DTYPES and has_kernels()


def write_kv(cache: KVCache, k: Tensor, v: Tensor, rows: Tensor | None, positions: Tensor) -> None:
    """Write k and v [N, K, h] of N tokens into the cache, in place, at `rows` and `positions`, both
    int64 [N] (rows None: token i in row i).

    int8 quantization is symmetric: the largest absolute value of a head becomes 127. If two tokens have
    the same place, the last one stays; with the torch reference (see `can_attend`), either may stay.
    """
    if can_attend(k.device, k.dtype):
        torch.ops.yoke_kernels.write_kv(*cache, k, v, rows, positions)
    else:
        write_kv_reference(cache, k, v, rows, positions)


def attend(q: Tensor, cache: KVCache, at: Places, rule: Rule) -> Tensor:
    """q [N, H, h] of N tokens -> [N, H, h].

    Each token attends to its cache row, or its sources, up to and including its position, as `rule`
    says. Without rows, the cache has N rows. The cache has q's dtype, float16 or int8. Raises
    RuntimeError for inconsistent positions, rows or shapes.
    """
    if not can_attend(q.device, q.dtype):
        return attend_reference(q, cache, at, rule)
    return torch.ops.yoke_kernels.attend(q, *cache, *_flat(at, rule))


def write_and_attend(
    qkv: Tensor, angles: Angles | None, cache: KVCache, at: Places, rule: Rule
) -> Tensor:
    """All between a layer's linears: [N, (H + 2 K) * h] -> [N, H * h]. `qkv` holds the heads of
    queries, keys and values of N tokens.

    Queries and keys are rotated by the `angles` of their positions (None: not rotated), in float32 and
    rounded once, to the same bits as `kernels.rotary.rotate`. Then `write_kv` and `attend` follow;
    their docstrings describe the other arguments and the errors.
    """
    if not can_attend(qkv.device, qkv.dtype):
        return write_and_attend_reference(qkv, angles, cache, at, rule)
    rotation = angles or (None, None, False)
    return torch.ops.yoke_kernels.write_and_attend(qkv, *rotation, *cache, *_flat(at, rule))


def _flat(at: Places, rule: Rule) -> tuple[Any, ...]:
    """As arguments of the operators, whose schemas know tensors, numbers and lists of them only."""
    heads = [number for run in rule.runs for number in run]
    return at.rows, at.positions, heads, rule.scale, rule.cap, rule.window, at.sources


def write_and_attend_reference(
    qkv: Tensor, angles: Angles | None, cache: KVCache, at: Places, rule: Rule
) -> Tensor:
    """As `write_and_attend`, in plain torch, on any device."""
    _, num_kv, _, head_dim = cache.k.shape
    heads = qkv.unflatten(-1, (-1, head_dim))
    num_q = heads.shape[-2] - 2 * num_kv
    qk, v = heads.split((num_q + num_kv, num_kv), dim=-2)
    if angles is not None:  # rotates queries and keys together, in one kernel
        qk = rotate(qk, angles.cos[at.positions], angles.sin[at.positions], angles.interleaved)
    q, k = qk.split((num_q, num_kv), dim=-2)
    write_kv_reference(cache, k, v, at.rows, at.positions)
    return attend_reference(q, cache, at, rule).flatten(1)


def write_kv_reference(
    cache: KVCache, k: Tensor, v: Tensor, rows: Tensor | None, positions: Tensor
) -> None:
    """As `write_kv`, in plain torch, on any device."""
    if rows is None:
        rows = torch.arange(k.shape[0], device=k.device)
    for new, into, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        if scales is None:
            into[rows, :, positions] = new.to(into.dtype)
            continue
        largest = new.float().abs().amax(-1)
        scales[rows, :, positions] = largest / 127
        # torch computes `127 / largest` as 127 times the reciprocal; this is a true division.
        factor = torch.where(largest > 2.0**-100, torch.full_like(largest, 127) / largest, 0.0)
        into[rows, :, positions] = (new.float() * factor.unsqueeze(-1)).round().to(torch.int8)


def attend_reference(q: Tensor, cache: KVCache, at: Places, rule: Rule) -> Tensor:
    """As `attend`, in plain torch, on any device, with static shapes, over the whole cache.

    It copies the cache, unless that has q's dtype and either rows=None or a single row.
    """
    num_rows, _, cache_len, _ = cache.k.shape
    rows, positions, sources = at
    keys, values = (
        _numbers(*part, q.dtype) for part in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    mask = causal_mask(positions.unsqueeze(1), cache_len, q.dtype, rule.window)  # [N, 1, 1, S]
    if sources is not None:
        every = torch.arange(sources.shape[1], device=q.device)
        keys, values = (x[sources, :, every].transpose(1, 2) for x in (keys, values))  # [N, K, S, h]
        mask = mask[..., : sources.shape[1]]
    elif rows is not None:
        # Treats all cache rows as one long row; the mask limits each token to its own part.
        keys, values = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (keys, values))
        other = rows.unsqueeze(1) != torch.arange(num_rows, device=q.device)  # [N, R]
        mask = mask.squeeze(1).masked_fill(other.unsqueeze(2), float("-inf"))  # [N, R, S]
        return attend_in_groups(q.unsqueeze(0), keys, values, mask.flatten(1)[None, None], rule)[0]
    return attend_in_groups(q.unsqueeze(1), keys, values, mask, rule).squeeze(1)


def _numbers(cached: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scales is None:
        return cached.to(dtype)
    return (cached * scales.unsqueeze(-1)).to(dtype)


def attend_in_groups(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """torch's attention over all of keys and values [B, K, S, h]: q [B, T, H, h] -> [B, T, H, h].

    `mask` [B, 1, T, S], which has the rule's window, is added to the scores. This is the slow
    reference, for any device and compiler.
    """
    batch, length, _, size = q.shape
    heads = q.transpose(1, 2)
    parts = []
    for q_start, q_stop, kv_start, kv_stop in rule.runs:
        # The g query heads that share a KV head become more query rows of that head, so the cache is
        # read once and never repeated: [B, k * g, T, h] -> [B, k, g * T, h].
        count = kv_stop - kv_start
        group = (q_stop - q_start) // count
        rows = heads[:, q_start:q_stop].reshape(batch, count, group * length, size)
        own = keys[:, kv_start:kv_stop], values[:, kv_start:kv_stop]
        attended = _softmax_attention(rows, *own, mask.repeat(1, 1, group, 1), rule.scale, rule.cap)
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
    """[B, 1, T, S] of 0 and -inf: a query at positions [B, T] attends to the cache up to its own
    position, and only to the last `window` tokens of that, including itself (0: all)."""
    cache = torch.arange(cache_len, device=positions.device)
    unseen = cache > positions.unsqueeze(-1)
    if window:
        unseen |= cache <= positions.unsqueeze(-1) - window
    mask = torch.zeros(unseen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill(unseen, float("-inf")).unsqueeze(1)
