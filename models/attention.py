"""What the families' attention has in common: a static cache, grouped heads, rotary embeddings.

Shapes: B batch, T tokens of this call, S cache length, H query heads of this rank, K its KV heads,
h head size. What is not here: the projections, which differ by family.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tp.heads import Heads


class CachedAttention(nn.Module):
    """Softmax attention of this rank's query heads over the cache of its KV heads."""

    # Buffers of `setup`: [B, K, S, h].
    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, heads: Heads, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim

    def setup(self, batch_size: int, cache_len: int, like: Tensor) -> None:
        shape = (batch_size, self.heads.num_kv, cache_len, self.head_dim)
        self.register_buffer("k_cache", like.new_zeros(shape), persistent=False)
        self.register_buffer("v_cache", like.new_zeros(shape), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """q [B, T, H, h], k and v [B, T, K, h] -> [B, T, H * h]; `mask` [T, S] is added to scores."""
        batch, length = q.shape[:2]
        q = q.transpose(1, 2)
        self.k_cache[:, :, positions] = k.transpose(1, 2)
        self.v_cache[:, :, positions] = v.transpose(1, 2)
        parts = []
        for run in self.heads.runs:
            keys = self.k_cache[:, run.kv_start : run.kv_stop]  # [B, k, S, h]
            values = self.v_cache[:, run.kv_start : run.kv_stop]
            # The query heads that share a KV head become further rows of its queries, so that the
            # cache is read once and never repeated: [B, k * g, T, h] -> [B, k, g * T, h].
            count = run.kv_stop - run.kv_start
            group = (run.q_stop - run.q_start) // count
            rows = q[:, run.q_start : run.q_stop].reshape(batch, count, group * length, self.head_dim)
            attended = F.scaled_dot_product_attention(rows, keys, values, mask.repeat(group, 1))
            parts.append(attended.reshape(batch, count * group, length, self.head_dim))
        return torch.cat(parts, dim=1).transpose(1, 2).reshape(batch, length, -1)


def causal_mask(positions: Tensor, cache_len: int, dtype: torch.dtype) -> Tensor:
    """[T, S]: a query sees the cache up to its own position."""
    cache = torch.arange(cache_len, device=positions.device)
    mask = torch.zeros(positions.shape[0], cache_len, dtype=dtype, device=positions.device)
    return mask.masked_fill(cache > positions.unsqueeze(1), float("-inf"))


def rope_tables(length: int, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency: two float32 [length, rotary_dim / 2] (Su et al., 2021)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other: x [B, T, heads, h], cos/sin [T, h/2]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbours against each other, in the first r of a head's h numbers: cos/sin [T, r/2]."""
    size = 2 * cos.shape[-1]
    turned, kept = x[..., :size].float(), x[..., size:]
    first, second = turned[..., 0::2], turned[..., 1::2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), kept), dim=-1)
