"""GPT-J: attention and MLP side by side on one norm, so that a layer needs a single allreduce.

Layer norms and a head with bias, plain MLP, rotary embeddings of neighbouring numbers in part of each
head. Source: Wang and Komatsuzaki, GPT-J-6B (2021). Shapes as in `models.llama`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comm import ops
from comm.group import Group
from models.attention import CachedAttention, causal_mask, rope_tables, rotate_pairs
from models.config import ModelConfig
from models.llama import layout_of
from tp.layers import ColumnLinear, LMHead, RowLinear, VocabEmbedding
from tp.shard import Layout


class GptJ(nn.Module):
    """A decoder whose KV cache is static: `setup` allocates it, `forward` writes and reads it."""

    # Buffers of `setup`.
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.layout = layout = layout_of(config, group.rank, group.size)
        self.embed = VocabEmbedding(layout.vocab_block, layout.vocab_start, config.dim, group)
        self.layers = nn.ModuleList(Block(config, layout, group) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)
        head = nn.Parameter(torch.empty(layout.vocab_block, config.dim), requires_grad=False)
        self.head = LMHead(layout.vocab_block, config.vocab_size, head, group, bias=True)

    def setup(self, batch_size: int, cache_len: int) -> None:
        """Allocate the KV caches and the rotary tables for positions 0..cache_len-1."""
        weight = self.norm.weight
        cos, sin = rope_tables(cache_len, self.config.rotary_dim, self.config.rope_theta)
        self.register_buffer("cos", cos.to(weight.device), persistent=False)
        self.register_buffer("sin", sin.to(weight.device), persistent=False)
        for module in self.modules():
            if isinstance(module, CachedAttention):
                module.setup(batch_size, cache_len, weight)

    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor | None = None) -> Tensor:
        """Logits of one token per row, as `models.llama.Llama.forward`."""
        positions = positions.reshape(-1)  # a batch of one may come as [1, T]
        cos, sin = self.cos[positions], self.sin[positions]  # [T, r/2]
        x = self.embed(tokens)  # [B, T, D]
        mask = causal_mask(positions, self.cos.shape[0], x.dtype)
        for block in self.layers:
            x = block(x, positions, cos, sin, mask)
        if last is not None:
            x = x.index_select(1, last)
        return self.head(self.norm(x)).squeeze(1).float()


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)): the ranks' parts of both are added up at once."""

    def __init__(self, config: ModelConfig, layout: Layout, group: Group) -> None:
        super().__init__()
        self.group = group
        self.head_dim = config.head_dim
        heads, width = layout.heads, layout.ffn_stop - layout.ffn_start
        q, kv = heads.num_q * config.head_dim, heads.num_kv * config.head_dim
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.qkv = ColumnLinear(config.dim, (q, kv, kv))
        self.attention = CachedAttention(heads, config.head_dim)
        self.out = RowLinear(q, config.dim)
        self.up = ColumnLinear(config.dim, (width,), bias=True)
        self.down = RowLinear(width, config.dim, bias=True)

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.split(normed))
        attended = self.attention(
            rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin), v, positions, mask
        )
        part = self.out(attended) + self.down(F.gelu(self.up(normed), approximate="tanh"))
        return x + ops.all_reduce(part, self.group)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last dimension (Ba et al., 2016)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
