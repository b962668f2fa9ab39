"""The Llama family, top to bottom: embedding, blocks of attention and MLP, norm, head.

Each rank builds its own part: `Layout` says which heads, which slice of the MLP and which tokens.
Activations between the layers are whole and the same on every rank; the only communication is the
sum at the end of attention and MLP, the embedding and the head.

Rotary embeddings are real-valued (the halves of a head are rotated against each other), as in the
weights that Hugging Face publishes. Shapes: B batch, T tokens of this call, S cache length, D dim,
H query heads of this rank, K its KV heads, h head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comm import ops
from comm.group import Group
from models.attention import CachedAttention, causal_mask, rope_tables, rotate
from models.config import ModelConfig
from tp.layers import ColumnLinear, LMHead, RowLinear, VocabEmbedding
from tp.shard import Layout, plan_layout


def layout_of(config: ModelConfig, rank: int, world_size: int) -> Layout:
    """Which part of a model of this config a rank holds. Raises InputError."""
    return plan_layout(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        vocab_size=config.vocab_size,
        rank=rank,
        world_size=world_size,
    )


class Llama(nn.Module):
    """A decoder whose KV cache is static: `setup` allocates it, `forward` writes and reads it."""

    # Buffers of `setup`.
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        layout = layout_of(config, group.rank, group.size)
        self.layout = layout
        self.embed = VocabEmbedding(layout.vocab_block, layout.vocab_start, config.dim, group)
        self.layers = nn.ModuleList(Block(config, layout, group) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        tied = self.embed.weight if config.tie_embeddings else None
        head = (
            tied
            if tied is not None
            else nn.Parameter(torch.empty(layout.vocab_block, config.dim), requires_grad=False)
        )
        self.head = LMHead(layout.vocab_block, config.vocab_size, head, group)

    def setup(self, batch_size: int, cache_len: int) -> None:
        """Allocate the KV caches and the rotary tables for positions 0..cache_len-1."""
        weight = self.norm.weight
        cos, sin = rope_tables(cache_len, self.config.head_dim, self.config.rope_theta)
        self.register_buffer("cos", cos.to(weight.device), persistent=False)
        self.register_buffer("sin", sin.to(weight.device), persistent=False)
        for module in self.modules():
            if isinstance(module, CachedAttention):
                module.setup(batch_size, cache_len, weight)

    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor | None = None) -> Tensor:
        """Logits of one token per row: float32 [B, vocab_size].

        tokens: int64 [B, T] at `positions`: int64 [T], ascending. `last`: int64 [1], the index in
        0..T-1 whose logits are wanted; None means the only one (T = 1). Tokens after `last` may be
        padding: what they leave in the cache is overwritten before anything attends to it.
        """
        positions = positions.reshape(-1)  # a batch of one may come as [1, T]
        cos, sin = self.cos[positions], self.sin[positions]  # [T, h/2]
        x = self.embed(tokens)  # [B, T, D]
        mask = causal_mask(positions, self.cos.shape[0], x.dtype)
        norms: list[RMSNorm] = [*(block.attention_norm for block in self.layers), self.norm]  # type: ignore
        normed = norms[0](x)
        for block, norm in zip(self.layers, norms[1:], strict=True):
            normed, x = block(normed, x, norm, positions, cos, sin, mask)
        if last is not None:
            normed = normed.index_select(1, last)
        return self.head(normed).squeeze(1).float()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each with one collective that sums over the ranks,
    adds the residual x and normalises for what follows."""

    def __init__(self, config: ModelConfig, layout: Layout, group: Group) -> None:
        super().__init__()
        self.group = group
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layout)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config, layout)

    def forward(
        self,
        normed: Tensor,
        x: Tensor,
        following: RMSNorm,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] and its norm -> (normalised for what is `following`, x after this block)."""
        part = self.attention(normed, positions, cos, sin, mask)
        norm = self.mlp_norm
        normed, x = ops.all_reduce_add_rms_norm(part, x, norm.weight, norm.eps, self.group)
        part = self.mlp(normed)
        return ops.all_reduce_add_rms_norm(part, x, following.weight, following.eps, self.group)


class Attention(nn.Module):
    """Grouped-query attention for this rank's heads; the ranks' results add up to the whole."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads = layout.heads
        q, kv = heads.num_q * config.head_dim, heads.num_kv * config.head_dim
        self.qkv = ColumnLinear(config.dim, (q, kv, kv), config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.inner = CachedAttention(heads, config.head_dim)
        self.out = RowLinear(q, config.dim, config.attention_out_bias)

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.split(x))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.out(self.inner(q, k, v, positions, mask))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with this rank's slice of the width."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        width = layout.ffn_stop - layout.ffn_start
        self.gate_up = ColumnLinear(config.dim, (width, width), config.mlp_bias)
        self.down = RowLinear(width, config.dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.split(x)
        return self.down(F.silu(gate) * up)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        scale = torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        return (full * scale).to(x.dtype) * self.weight
