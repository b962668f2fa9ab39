"""The decoder that all families share, top to bottom: embedding, blocks, norm, head.

Each rank builds its own part: `Layout` says which heads, which slice of the MLP and which vocabulary
entries. Activations between layers are full-width and identical on every rank. The only communication
is the sum after attention and after the MLP, the embedding and the head. The blocks are in
`models.llama`, `models.gemma` and `models.parallel`.

Shapes: N tokens of this call, of any mixture of sequences; M tokens whose results are wanted; R cache
rows (one per sequence), S their length; D model width; H query heads, K KV heads, h head width
(`models.attention`); V vocabulary. [B, T]: B sequences of T tokens each, processed together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from comm import ops
from comm.group import Group
from kernels.attention import Places
from kernels.rotary import Angles
from models import gemma, llama, parallel
from models.attention import CachedAttention, Step
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
    """A decoder with a static KV cache: `setup` allocates it, the other methods write and read it.

    An engine runs `extend`, `decode` and `decode_greedy`. `forward` and `all_logits` do the same for
    sequences of equal length.
    """

    # Buffers made by `setup`; the local ones only if layers with a window have their own `local_rope`.
    cos: Tensor
    sin: Tensor
    local_cos: Tensor
    local_sin: Tensor

    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.group = group
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
        # Set when the weights are loaded: the scheme of most layers, and a line for the user.
        self.quantized = self.about_quant = ""

    def setup(self, num_rows: int, cache_len: int, kv_dtype: torch.dtype | None = None) -> None:
        """Allocate KV caches for `num_rows` sequences and the rotary tables for positions
        0..cache_len-1. `kv_dtype`: a dtype that `kernels.attention.new_cache` takes (None: the
        weights' dtype)."""
        weight, config = self.norm.weight, self.config
        for name, rope in (("", config.rope), ("local_", config.local_rope)):
            if rope is not None:
                cos, sin = rope_tables(rope, config.head_dim, cache_len)
                self.register_buffer(f"{name}cos", cos.to(weight.device), persistent=False)
                self.register_buffer(f"{name}sin", sin.to(weight.device), persistent=False)
        for module in self.modules():
            if isinstance(module, CachedAttention):
                module.setup(num_rows, cache_len, kv_dtype or weight.dtype, weight.device)
        # Rounded to the weights' dtype: the models were trained with the rounded value.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=weight.dtype))

    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor | None = None) -> Tensor:
        """Logits of one token per sequence: float32 [B, V]. Sequence i uses cache row i.

        tokens: int64 [B, T]. positions: int64 [B, T], or [T] for all sequences, ascending. `last`:
        int64 [B] or [1], the index in 0..T-1 whose logits are wanted; None requires T = 1. Tokens after
        `last` may be padding: their cache entries are overwritten before anything attends to them.
        """
        batch, length = tokens.shape
        wanted = None
        if last is not None:
            wanted = torch.arange(0, batch * length, length, device=tokens.device) + last
        return self.logits(self._batch(tokens, positions, wanted))

    def all_logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of every token: as `forward`, but float32 [B, T, V], on all ranks.

        For measurements that need them all. Generation needs one position per sequence, and V is large.
        """
        return self.logits(self._batch(tokens, positions)).unflatten(0, tokens.shape)

    def extend(self, tokens: Tensor, positions: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
        """Logits of the `wanted` tokens among N: float32 [M, V].

        tokens, positions, rows: int64 [N]. The tokens may belong to any mixture of sequences, each in
        its cache row, with ascending positions within a row. `wanted`: int64 [M], indices in 0..N-1.
        """
        return self.logits(self.hidden(tokens, positions, rows, wanted=wanted))

    def decode(self, tokens: Tensor, positions: Tensor, sources: Tensor | None = None) -> Tensor:
        """Logits after one token per cache row: tokens int64 [R], positions int64 [R] -> float32
        [R, V]. `sources`: int32 [R, S], see `kernels.attention.attend`."""
        return self.logits(self.hidden(tokens, positions, None, sources))

    def decode_greedy(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The argmax after one token per cache row: int64 [R], the same on every rank. Ties resolve to
        the lowest token. Ranks exchange one candidate each, not their logits. The result is negative
        where the largest logit is not a finite number (`ops.argmax`)."""
        local = self.head.local(self.hidden(tokens, positions, None))
        start, stop = self.layout.vocab_start, self.layout.vocab_stop
        return ops.argmax(local[:, : stop - start], start, self.group)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [M, D] from `hidden` -> logits, float32 [M, V], on all ranks."""
        logits: Tensor = self.head(hidden).float()
        if self.config.logits_scale != 1:
            logits = logits * self.config.logits_scale
        if self.config.logits_cap:
            logits = self.config.logits_cap * torch.tanh(logits / self.config.logits_cap)
        return logits

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor | None,
        sources: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Embedding, blocks and final norm of N tokens: [N, D], or [M, D] if some are `wanted`.
        `rows` None: there is one token for each cache row, in order."""
        step = self._step(positions, rows, sources)
        x = self.embed(tokens)  # [N, D]
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        norms: list[Norm] = [block.norm for block in self.layers]  # type: ignore[misc]
        normed = norms[0](x)
        *blocks, last = self.layers
        for block, following in zip(blocks, norms[1:], strict=True):
            normed, x = block(normed, x, following, step)
        normed, _ = last(normed, x, self.norm, step._replace(wanted=wanted))
        return normed

    def _batch(self, tokens: Tensor, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
        """`hidden` of [B, T] tokens: [B * T, D], or [M, D] if some are `wanted`."""
        batch, length = tokens.shape
        rows = None
        if length > 1:
            rows = torch.arange(batch, device=tokens.device).repeat_interleave(length)
        return self.hidden(
            tokens.flatten(), positions.expand(batch, length).flatten(), rows, wanted=wanted
        )

    def _step(self, positions: Tensor, rows: Tensor | None, sources: Tensor | None) -> Step:
        full = windowed = Angles(self.cos, self.sin, self.config.rope.interleaved)
        if self.config.local_rope is not None:
            windowed = full._replace(cos=self.local_cos, sin=self.local_sin)
        return Step(Places(rows, positions, sources), full, windowed)
