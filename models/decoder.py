"""The decoder that all families share, top to bottom: embedding, blocks, norm, head.

Each rank builds its own part: `Layout` says which heads, which slice of the MLP and which tokens.
Activations between the layers are whole and the same on every rank; the only communication is the sum
at the end of attention and MLP, the embedding and the head. What a block is, is told by the families'
files: `models.llama`, `models.gemma`, `models.parallel`.

Shapes: B batch, T tokens of this call, S cache length, D dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from comm.group import Group
from kernels.attention import can_attend, causal_mask
from models import gemma, llama, parallel
from models.attention import CachedAttention, Step, View
from models.config import ModelConfig
from models.norms import Norm, norm_of
from models.rope import rope_tables
from models.sizes import layout_of
from tp.layers import LMHead, VocabEmbedding

BLOCKS: dict[str, type[nn.Module]] = {
    "llama": llama.Block,
    "gemma": gemma.Block,
    "parallel": parallel.Block,
}


class Decoder(nn.Module):
    """A decoder whose KV cache is static: `setup` allocates it, `forward` writes and reads it."""

    # Buffers of `setup`: cos and sin, of the layers with a window where they have their own.
    cos: Tensor
    sin: Tensor
    local_cos: Tensor
    local_sin: Tensor

    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.layout = layout = layout_of(config, group.rank, group.size)
        self.embed = VocabEmbedding(layout.vocab_block, layout.vocab_start, config.dim, group)
        block = BLOCKS[config.block]
        self.layers = nn.ModuleList(block(config, layout, group, i) for i in range(config.num_layers))
        self.norm = norm_of(config)
        head = self.embed.weight
        if not config.tie_embeddings:
            head = nn.Parameter(torch.empty(head.shape), requires_grad=False)
        self.head = LMHead(layout.vocab_block, config.vocab_size, head, group, config.head_bias)
        self.embedding_scale = config.embedding_scale

    def setup(self, batch_size: int, cache_len: int) -> None:
        """Allocate the KV caches and the rotary tables for positions 0..cache_len-1."""
        weight, config = self.norm.weight, self.config
        for name, rope in (("", config.rope), ("local_", config.local_rope)):
            if rope is not None:
                cos, sin = rope_tables(rope, config.head_dim, cache_len)
                self.register_buffer(f"{name}cos", cos.to(weight.device), persistent=False)
                self.register_buffer(f"{name}sin", sin.to(weight.device), persistent=False)
        for module in self.modules():
            if isinstance(module, CachedAttention):
                module.setup(batch_size, cache_len, weight)
        # Rounded as the weights are: the models were trained with it so.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=weight.dtype))

    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor | None = None) -> Tensor:
        """Logits of one token per row: float32 [B, vocab_size].

        tokens: int64 [B, T] at `positions`: int64 [B, T], or [T] for all rows, ascending. `last`: int64
        [B] or [1], the index in 0..T-1 whose logits are wanted; None means the only one (T = 1). Tokens
        after `last` may be padding: what they leave in the cache is overwritten before anything
        attends to it.
        """
        normed = self._run(tokens, positions)
        if last is not None:
            index = last.expand(tokens.shape[0])[:, None, None].expand(-1, 1, normed.shape[-1])
            normed = normed.gather(1, index)
        return self._logits(normed).squeeze(1)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of every token: as `forward`, but float32 [B, T, vocab_size], on all ranks.

        For measures that want them all; generation wants one a row, and a vocabulary is wide.
        """
        return self._logits(self._run(tokens, positions))

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embedding and blocks, and the last norm: [B, T, D]."""
        step = self._step(positions.expand(tokens.shape))
        x = self.embed(tokens)  # [B, T, D]
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        norms: list[Norm] = [*(block.norm for block in self.layers), self.norm]  # type: ignore[list-item]
        normed = norms[0](x)
        for block, following in zip(self.layers, norms[1:], strict=True):
            normed, x = block(normed, x, following, step)
        return normed

    def _logits(self, normed: Tensor) -> Tensor:
        logits: Tensor = self.head(normed).float()
        if self.config.logits_scale != 1:
            logits = logits * self.config.logits_scale
        if self.config.logits_cap:
            logits = self.config.logits_cap * torch.tanh(logits / self.config.logits_cap)
        return logits

    def _step(self, positions: Tensor) -> Step:
        config, cache_len, dtype = self.config, self.cos.shape[0], self.norm.weight.dtype
        cos, sin = self.cos[positions], self.sin[positions]  # [B, T, r/2]
        own = can_attend(positions.device, dtype)
        mask = None if own else causal_mask(positions, cache_len, dtype)
        full = windowed = View(cos, sin, mask)
        if config.window:
            if config.local_rope is not None:
                cos, sin = self.local_cos[positions], self.local_sin[positions]
            mask = None if own else causal_mask(positions, cache_len, dtype, config.window)
            windowed = View(cos, sin, mask)
        rows = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
        return Step(rows, positions, full, windowed)
