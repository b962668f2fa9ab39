"""What the families' attention has in common: projections, rotary embeddings, a static cache, grouped
heads, sliding windows.

Shapes: B batch, T tokens of this call, S cache length, D dim, H query heads of this rank, K its KV
heads, h head size. What is not here: the sum over the ranks, which the blocks do.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kernels.attention import KVCache, attend, attend_in_groups, new_cache, write
from models.config import ModelConfig
from models.norms import norm_of
from models.rope import rotate
from tp.heads import Heads
from tp.layers import ColumnLinear, RowLinear
from tp.shard import Layout


class View(NamedTuple):
    """How the layers of one kind see the tokens of a call: cos and sin [B, T, r/2], and what is added
    to the scores, [B, 1, T, S], where attention goes over the whole cache."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class Step(NamedTuple):
    """What all layers of a call share: the cache's rows [B, 1] and positions [B, T] that it writes,
    and the two kinds of view."""

    rows: Tensor
    positions: Tensor
    full: View
    windowed: View


class Attention(nn.Module):
    """Grouped-query attention for this rank's heads; the ranks' results add up to the whole."""

    def __init__(self, config: ModelConfig, layout: Layout, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads = layout.heads
        q, kv = heads.num_q * config.head_dim, heads.num_kv * config.head_dim
        self.qkv = ColumnLinear(config.dim, (q, kv, kv), config.attention_bias)
        self.q_norm = norm_of(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = norm_of(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.is_windowed = config.is_windowed(layer)
        self.inner = CachedAttention(
            heads,
            config.head_dim,
            config.attention_scale,
            config.attention_cap,
            config.window if self.is_windowed else 0,
        )
        self.out = RowLinear(q, config.dim, config.attention_out_bias)
        self.has_rope = layer not in config.no_rope
        self.interleaved = config.rope.interleaved

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [B, T, D] -> this rank's part of the result, [B, T, D]."""
        view = step.windowed if self.is_windowed else step.full
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.split(x))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.has_rope:
            q = rotate(q, view.cos, view.sin, self.interleaved)
            k = rotate(k, view.cos, view.sin, self.interleaved)
        return self.out(self.inner(q, k, v, step.rows, step.positions, view.mask))


class CachedAttention(nn.Module):
    """Softmax attention of this rank's query heads over the cache of its KV heads. Scores are
    multiplied by `scale` (0: h ** -0.5) and, with a `cap`, bent to cap * tanh(score / cap). A `window`
    is what a token sees of the cache at most (0: all); the mask says the same."""

    # Buffers of `setup`, what KVCache is made of: [B, K, S, h].
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def __init__(
        self, heads: Heads, head_dim: int, scale: float = 0.0, cap: float = 0.0, window: int = 0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.scale = scale or head_dim**-0.5
        self.cap = cap
        self.window = window
        self.runs = [(run.q_start, run.q_stop, run.kv_start, run.kv_stop) for run in heads.runs]

    def setup(self, batch_size: int, cache_len: int, like: Tensor) -> None:
        cache = new_cache(
            batch_size, self.heads.num_kv, cache_len, self.head_dim, like.dtype, like.device
        )
        for name, part in zip(("k_cache", "v_cache", "k_scale", "v_scale"), cache, strict=True):
            self.register_buffer(name, part, persistent=False)

    @property
    def cache(self) -> KVCache:
        return KVCache(self.k_cache, self.v_cache, self.k_scale, self.v_scale)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """q [B, T, H, h], k and v [B, T, K, h] -> [B, T, H * h]. `mask` [B, 1, T, S] is added to the
        scores of the whole cache; without one, the part in use is attended to."""
        if mask is not None:
            self.k_cache[rows, :, positions] = k
            self.v_cache[rows, :, positions] = v
            attended = attend_in_groups(
                q, self.k_cache, self.v_cache, mask, self.runs, self.scale, self.cap
            )
            return attended.flatten(2)
        own, where = rows.expand(positions.shape).flatten(), positions.flatten()
        write(self.cache, k.flatten(0, 1), v.flatten(0, 1), own, where)
        attended = attend(
            q.flatten(0, 1), self.cache, own, where, self.runs, self.scale, self.cap, self.window
        )
        return attended.view(*q.shape[:2], -1)
