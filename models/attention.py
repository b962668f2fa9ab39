"""The attention that all families share: projections, rotary embeddings, a static cache, grouped
heads, sliding windows.

Shapes: N tokens of this call, M tokens whose results are wanted, R rows of the cache, S their length,
D model width, H query heads of this rank, K KV heads of this rank, h head width.
What is not here: the sum over the ranks, which the blocks do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.attention import KVCache, Places, Rule, new_cache, write_and_attend
from kernels.rotary import Angles
from models.config import ModelConfig
from models.norms import norm_of
from tp.heads import Heads
from tp.layers import ColumnLinear, RowLinear
from tp.shard import Layout


class Step(NamedTuple):
    """What all layers of a call share.

    at: where the tokens are in the cache. full, windowed: the angles of layers without and with a
    sliding window. wanted: set for the last layer only, the indices [M] of the tokens whose results are
    read (None: all); the other tokens only write their keys and values."""

    at: Places
    full: Angles
    windowed: Angles
    wanted: Tensor | None = None

    def chosen(self, x: Tensor) -> Tensor:
        """The wanted rows of x: [N, ..] -> [M, ..]."""
        return x if self.wanted is None else x[self.wanted]


class Attention(nn.Module):
    """Grouped-query attention over this rank's heads. The sum over the ranks is the full result."""

    def __init__(self, config: ModelConfig, layout: Layout, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads = layout.heads
        q, kv = heads.num_q * config.head_dim, heads.num_kv * config.head_dim
        self.qkv = ColumnLinear(config.dim, (q, kv, kv), config.attention_bias)
        self.has_norms = config.qk_norm
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

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [N, D] -> this rank's partial sum of the result, [M, D]."""
        qkv = self.qkv(x)
        if self.has_norms:
            q, k, v = (
                part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.qkv.parts, -1)
            )
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-2).flatten(1)
        angles = step.windowed if self.is_windowed else step.full
        attended = self.inner(qkv, angles if self.has_rope else None, step)
        return self.out(step.chosen(attended))


class CachedAttention(nn.Module):
    """Softmax attention of this rank's query heads over the cache of its KV heads. Scores are
    multiplied by `scale` (0: h ** -0.5). A `cap` then maps them to cap * tanh(score / cap) (0: no cap).
    A token attends to at most `window` tokens (0: to all)."""

    # Buffers made by `setup`: [R, K, S, h]; an int8 cache has float32 scales [R, K, S] too.
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
        runs = [(run.q_start, run.q_stop, run.kv_start, run.kv_stop) for run in heads.runs]
        self.rule = Rule(runs, scale or head_dim**-0.5, cap, window)

    def setup(
        self, num_rows: int, cache_len: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        cache = new_cache(num_rows, self.heads.num_kv, cache_len, self.head_dim, dtype, device)
        for name, part in zip(("k_cache", "v_cache", "k_scale", "v_scale"), cache, strict=True):
            self.register_buffer(name, part, persistent=False)

    def forward(self, qkv: Tensor, angles: Angles | None, step: Step) -> Tensor:
        """[N, (H + 2 K) * h] -> [N, H * h]. Queries and keys are rotated by the `angles`, if any."""
        cache = KVCache(self.k_cache, self.v_cache, self.k_scale, self.v_scale)
        return write_and_attend(qkv, angles, cache, step.at, self.rule)
